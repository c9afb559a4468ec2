"""A fitted bank as one file that scores images with nothing but jax and flatbuffers installed.

    python -m experiments.export --bank=BANK --out=FILE

BANK is what `python -m experiments.mvtec` writes as `bank/`, or any folder of `save_bank`. FILE
gets the program (StableHLO for cpu, cuda and tpu, any batch size), the weights of the backbone, the
bank, and a manifest; `inreach_jax/exported.py`, which may be copied, loads it. docs/export.md has
the format, what it promises, and what to use for TensorFlow and ONNX.

`--size=H,W` is the size of the images that it will take; by default what the bank's config resizes
to. The artefact also says which images score `--threshold=X` or more: by default, where the bank
has a calibration (`python -m experiments.inspect` makes one), what it expects of --false_alarms
(0.05) of good images. `--backbone` and `--weights` are those that the bank was fitted with.
"""

import dataclasses
import pathlib

from absl import flags

import inreach_jax
from experiments import common_flags, folder, runner

_OUT = flags.DEFINE_string("out", None, "The file to write.")
_THRESHOLD = flags.DEFINE_float("threshold", None, "Images that score at least this are anomalous.")


def main() -> None:
    """Writes the artefact that the flags describe."""
    directory = common_flags.required(common_flags.BANK)
    out = pathlib.Path(common_flags.required(_OUT)).expanduser()
    size = common_flags.size()
    fixed = ("preset", *(field.name for field in dataclasses.fields(inreach_jax.InReachConfig)))
    superfluous = [f"--{name}" for name in fixed if flags.FLAGS[name].present]
    if superfluous:
        raise ValueError(f"the options are those of the bank; leave out {', '.join(superfluous)}")
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder; name a file")
    runner.make_workdir(out.parent, flag="out: folder")
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    bank, config = inreach_jax.restore_bank(directory, backbone=backbone)
    threshold = _threshold(directory)
    artefact = inreach_jax.export_score(
        backbone,
        bank,
        config=config,
        size=size,
        threshold=threshold,
        command=runner.command(),
    )
    runner.write_bytes(out, artefact)
    height, width = size or config.resize
    print(
        f"{out}: {len(artefact) / 2**20:.1f} MiB, takes uint8 images [B, {height}, {width}, 3], "
        f"{int(bank.count)} bank rows, "
        + ("no threshold" if threshold is None else f"threshold {threshold:.4g}")
    )


def _threshold(directory: str) -> float | None:
    """That of --threshold, or of the bank's calibration; None where there is neither.

    Raises:
      ValueError: the calibration is damaged, or --false_alarms out of range.
    """
    if _THRESHOLD.value is not None:
        return float(_THRESHOLD.value)
    try:
        calibration = inreach_jax.restore_calibration(directory)
    except FileNotFoundError:
        return None
    image, _ = inreach_jax.threshold(calibration, false_alarm_rate=folder.FALSE_ALARMS.value)
    return float(image)


if __name__ == "__main__":
    runner.main(main)
