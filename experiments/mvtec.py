"""InReaCh on MVTec AD, VisA, BTAD, MPDD, or on any folder in one of their layouts.

    python -m experiments.mvtec --category=screw --data_dir=DIR --workdir=OUT

DIR holds `<category>/train/good`, `test/<type>` and `ground_truth/<type>/*_mask.png`, or another
layout of docs/data.md. MVTec AD is published under CC BY-NC-SA 4.0 at
https://www.mvtec.com/company/research/datasets/mvtec-ad. `--tfds_dir=DIR` instead of --data_dir
reads what `python -m experiments.prepare` has prepared.

Trains on train/good without looking at a label, scores test, and writes into OUT `manifest.json`
(every image that is fitted or scored, with its SHA-256), `metrics.json`, `scores.csv`, `heatmaps/`
and `bank/`. `--category=all` does so for every category into `OUT/<category>` and averages.

`--protocol` says what is trained on and scored (docs/data.md): `clean`, `noise` with `--ratio`,
`--overlap=yes`, `--max_ratio` and `--max_train`, or `official`, for which `--contaminate=40` is
short: it adds 40 test images to the training images and leaves them in the test set, which is how
the released reference was evaluated. `--manifest=FILE` runs exactly what another run did, and
refuses to if a file is not the same any more.

A killed run goes on where it was when the same command is given again. Several devices share the
work, and with `--distributed` several processes: docs/scaling.md. `--precision=fast`
searches large banks by products of 16 bits, with the same results.

Expected of screw (512 px, EfficientNet-Lite0), with the seconds of two CPU cores: see README.md.
"""

import dataclasses

from absl import flags

import inreach_jax
from experiments import common_flags, runner
from experiments.progress import PhaseTimer
from inreach_jax.datasets import (
    Dataset,
    Manifest,
    apply_manifest,
    list_entries,
    make_manifest,
    read_manifest,
    write_manifest,
)
from inreach_jax.datasets.protocols import NUM_CONTAMINATE

_MAX_TRAIN = flags.DEFINE_integer(
    "max_train", None, "Only the first so many; noise: exactly so many.", lower_bound=1
)
_MAX_TEST = flags.DEFINE_integer(
    "max_test", None, "Only so many, spread evenly over the types.", lower_bound=1
)
_CONTAMINATE = flags.DEFINE_integer(
    "contaminate",
    NUM_CONTAMINATE,
    "Test images to add to the training images; implies --protocol=official.",
    lower_bound=0,
)
_RATIO = flags.DEFINE_float("ratio", 0.0, "Noise: anomalous share of the training images.")
_MAX_RATIO = flags.DEFINE_float("max_ratio", 0.5, "Noise: highest ratio to compare with.")
_MANIFEST = flags.DEFINE_string("manifest", None, "A manifest.json to run exactly.")

_FIXED_BY_MANIFEST = (
    *("contaminate", "max_ratio", "max_test", "max_train"),
    *("overlap", "protocol", "ratio", "seed"),
)


def main() -> None:
    """Fits and scores what the flags say."""
    config = common_flags.config()
    given = _given_manifest()
    category = given.category if given else common_flags.required(common_flags.CATEGORY)
    workdir = common_flags.required(common_flags.WORKDIR)
    protocol = _protocol()
    common_flags.budget()
    mesh = runner.start()
    # Whatever is wrong with a category, a flag or a file shows before the first one is fitted.
    every = category == "all"
    names = common_flags.categories() if every else [category]
    runs = [_choose(common_flags.load(name), protocol, given) for name in names]
    workdir = runner.make_workdir(workdir)
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )

    results = {}
    for dataset, manifest in runs:
        runner.say(
            f"{dataset.name}: {len(dataset.train)} training images, {len(dataset.test)} to score"
        )
        folder = runner.make_workdir(workdir / dataset.name) if every else workdir
        if runner.is_first():
            write_manifest(folder / "manifest.json", manifest)
        results[dataset.name] = runner.run_category(
            dataset,
            backbone=backbone,
            config=config,
            workdir=folder,
            batch_size=common_flags.BATCH_SIZE.value,
            mesh=mesh,
            identity=[entry.sha256 for entry in manifest.train],
        )
    if not runner.is_first():
        return
    if every:
        runner.finish(results, workdir=workdir)
    else:
        runner.print_results(results, workdir=workdir)


def _protocol() -> str:
    """The protocol that the flags mean.

    Raises:
      ValueError: they contradict one another, or it is one that this binary does not run.
    """
    protocol = str(common_flags.PROTOCOL.value or "clean")
    if common_flags.OVERLAP.value == "both":
        raise ValueError("--overlap=both is two runs; give yes or no")
    if flags.FLAGS["contaminate"].present:
        if protocol != "official" and flags.FLAGS["protocol"].present:
            raise ValueError(f"--contaminate is of --protocol=official; got --protocol={protocol}")
        protocol = "official"
    _refuse_transductive(protocol)
    return protocol


def _given_manifest() -> Manifest | None:
    """That of --manifest.

    Raises:
      OSError: it cannot be read.
      ValueError: it is none, or other flags say what it says.
    """
    if _MANIFEST.value is None:
        return None
    superfluous = [f"--{name}" for name in _FIXED_BY_MANIFEST if flags.FLAGS[name].present]
    if superfluous:
        raise ValueError(f"--manifest says it all; leave out {', '.join(superfluous)}")
    manifest = read_manifest(_MANIFEST.value)
    if common_flags.CATEGORY.value not in (None, manifest.category):
        raise ValueError(
            f"--manifest is of category {manifest.category}; got "
            f"--category={common_flags.CATEGORY.value}"
        )
    _refuse_transductive(manifest.protocol)
    return manifest


def _refuse_transductive(protocol: str) -> None:
    if protocol == "transductive":
        raise ValueError(
            "the transductive protocol scores each image against a bank without its own patches, "
            "which this binary does not do; run "
            "python -m experiments.contamination --protocol=transductive"
        )


def _choose(dataset: Dataset, protocol: str, given: Manifest | None) -> tuple[Dataset, Manifest]:
    """What is fitted and scored of a category, and the manifest that says so."""
    with PhaseTimer(silent=not runner.is_first()) as timer:
        if given is not None:
            return apply_manifest(dataset, given, progress=timer), given
        train, test = list_entries(dataset, progress=timer)
    manifest = make_manifest(
        dataset.name,
        train,
        test,
        protocol=protocol,
        seed=common_flags.SEED.value,
        ratio=_RATIO.value,
        overlap=common_flags.OVERLAP.value == "yes",
        max_ratio=_MAX_RATIO.value,
        num_train=_MAX_TRAIN.value if protocol == "noise" else None,
        num_contaminate=_CONTAMINATE.value,
    )
    chosen = runner.limit(
        apply_manifest(dataset, manifest, verify=False),
        max_train=_MAX_TRAIN.value,
        max_test=_MAX_TEST.value,
    )
    entries = {entry.name: entry for entry in train + test}
    manifest = dataclasses.replace(
        manifest,
        train=tuple(entries[name] for name in chosen.train.names),
        test=tuple(entries[name] for name in chosen.test.names),
    )
    return chosen, manifest


if __name__ == "__main__":
    runner.main(main, distributed=True)
