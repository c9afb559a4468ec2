"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const cards = [...document.querySelectorAll(".card")].map((node) => ({
    node,
    score: Number(node.dataset.score),
    name: node.dataset.name,
  }));
  const scores = [...data.scores].sort((a, b) => a - b);
  const low = Math.min(scores[0], data.threshold);
  const high = Math.max(scores[scores.length - 1], data.threshold);
  const span = high - low || 1;
  const BINS = 60;

  const counts = new Array(BINS).fill(0);
  for (const score of scores) {
    counts[Math.min(BINS - 1, Math.floor(((score - low) / span) * BINS))] += 1;
  }
  const svg = get("histogram");
  const make = (kind, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    svg.append(node);
    return node;
  };
  const tallest = Math.max(...counts);
  const bars = counts.map((count, i) => {
    const height = count ? Math.max(3, (count / tallest) * 115) : 0;
    const bar = make("rect", {
      class: "bar", x: i * 10 + 0.5, width: 9, y: 120 - height, height,
    });
    return { bar, end: low + ((i + 1) / BINS) * span };
  });
  const mark = make("line", { class: "mark", y1: 0, y2: 120 });

  // Log-linear between knots: shares of good images at or above a score.
  const alarms = (score) => {
    const [x, p] = data.knots;
    if (score <= x[0]) return p[0];
    for (let i = 1; i < x.length; i += 1) {
      if (score <= x[i]) {
        const t = x[i] > x[i - 1] ? (score - x[i - 1]) / (x[i] - x[i - 1]) : 1;
        return Math.exp((1 - t) * Math.log(p[i - 1]) + t * Math.log(p[i]));
      }
    }
    return p[p.length - 1];
  };
  const percent = (share) =>
    share >= 0.1 ? `${Math.round(share * 100)}%`
      : share >= 0.001 ? `${Number((share * 100).toPrecision(2))}%` : "under 0.1%";

  let threshold = data.threshold;
  const show = () => {
    const wanted = get("find").value.toLowerCase();
    const only = get("only").checked;
    for (const card of cards) {
      const over = card.score >= threshold;
      card.node.classList.toggle("over", over);
      card.node.hidden = (only && !over) || !card.name.toLowerCase().includes(wanted);
    }
    for (const { bar, end } of bars) bar.classList.toggle("over", end > threshold);
    const x = ((threshold - low) / span) * 600;
    mark.setAttribute("x1", x);
    mark.setAttribute("x2", x);
    get("value").textContent = threshold.toPrecision(4);
    get("above").textContent = String(scores.filter((score) => score >= threshold).length);
    get("alarms").textContent = percent(alarms(threshold));
  };
  const ORDERS = {
    odd: (a, b) => b.score - a.score,
    calm: (a, b) => a.score - b.score,
    name: (a, b) => a.name.localeCompare(b.name, "en", { numeric: true }),
  };
  const sort = () => {
    cards.sort(ORDERS[get("order").value]);
    get("gallery").append(...cards.map((card) => card.node));
  };

  get("threshold").value = String(Math.round(((threshold - low) / span) * 1000));
  get("threshold").addEventListener("input", (event) => {
    threshold = low + (Number(event.target.value) / 1000) * span;
    show();
  });
  get("order").addEventListener("change", sort);
  get("only").addEventListener("change", show);
  get("find").addEventListener("input", show);
  sort();
  show();
})();
