"""The README of a model: YAML front matter that model hubs read, and text for people, made of what the run says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graf.base.extras import import_optional
from graf.sharing.records import PEAKS, Measurement, Resources

WEIGHTS_FILE, CONFIG_FILE, GRID_FILE, VIDEO_FILE = "model.safetensors", "config.yaml", "grid.png", "rotation.mp4"
#: the nearest of the hub's tasks: an object of a class out of a random code
TASK = "unconditional-image-generation"
TAGS = ("3d", "gan", "generative-radiance-field", "nerf", "novel-view-synthesis")

#: what a score's name means to a reader
MEANINGS = {
    "fid": "Fréchet distance of Inception features (FID)",
    "kid": "kernel distance of Inception features (KID)",
    "fid_offline": "Fréchet distance of features of graf's fixed offline network; not comparable with FID",
    "kid_offline": "kernel distance of features of graf's fixed offline network; not comparable with KID",
    "precision": "share of renders that lie among the photographs",
    "recall": "share of photographs that lie among the renders",
    "psnr": "peak signal-to-noise ratio, dB, of renders at the photographs' cameras",
    "ssim": "structural similarity of the same",
}
_PREFIXES = {"sr_": "super-resolved: ", "bicubic_": "bicubic enlargement: "}


@dataclass(frozen=True)
class Choices:
    """What the person who publishes decides: name, licence, and ids of data sets on the hub; no file says these."""

    name: str
    license: str = "other"
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """What a run says of its generator, ready to be printed.

    facts, training: pairs of (what, value); data: what is said of the photographs, data_name: what they are called;
    data_type: data.type; tags: its own, besides TAGS; pictures: what grid and video show, video: whether there is one.
    """

    classes: Sequence[str]
    iteration: int
    facts: Sequence[tuple[str, str]]
    training: Sequence[tuple[str, str]]
    data: str
    data_name: str
    data_type: str
    tags: Sequence[str]
    pictures: str
    video: bool
    measurements: Sequence[Measurement]
    resources: Resources


def write_card(path: Path, choices: Choices, model: Model) -> int:
    """Write README.md and read it back as a hub would, without network; returns the number of results in it.

    Raises MissingExtra where huggingface_hub is not installed.
    """
    hub = import_optional("huggingface_hub", "share")
    results = [
        hub.EvalResult(
            task_type=TASK,
            dataset_type=model.data_type,
            dataset_name=model.data_name,
            dataset_split=score.split,
            metric_type=score.name,
            metric_name=describe_score(score.name),
            metric_value=round(score.value, 6),
            metric_args={name: value for name, value in score.provenance.items() if value is not None},
        )
        for score in model.measurements
    ]
    data = hub.ModelCardData(
        license=choices.license,
        library_name="graf",
        pipeline_tag=TASK,
        tags=[*TAGS, *model.tags],
        datasets=list(choices.datasets) or None,
        metrics=sorted({score.name for score in model.measurements}) or None,
        model_name=choices.name,
        eval_results=results or None,
    )
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{_describe(choices, model)}", encoding="utf-8", newline="\n")
    found = hub.ModelCard.load(path).data
    expected = (choices.license, len(results))
    if (found.license, len(found.eval_results or ())) != expected:
        raise ValueError(f"{path}: was read back as {found.to_dict()}, expected {expected}")
    return len(results)


def describe_score(name: str) -> str:
    """What a score's name means, in one phrase."""
    for prefix, text in _PREFIXES.items():
        if name.startswith(prefix):
            return text + describe_score(name.removeprefix(prefix))
    plain = name.removesuffix("_validation")
    return MEANINGS.get(plain) or MEANINGS.get(plain.removesuffix("_offline")) or plain


def _describe(choices: Choices, model: Model) -> str:
    """The text below the front matter."""
    example = json.dumps(model.classes[0], ensure_ascii=False)
    video = f'<video src="{VIDEO_FILE}" controls loop muted></video>\n\n' if model.video else ""
    return f"""# {choices.name}

A generative radiance field: a random code and a class name make an object, which can be rendered from any side, as
colour, depth and opacity. Classes: {", ".join(model.classes)}. Trained with `graf` for {model.iteration:,} iterations.

![Objects in rows, azimuths in columns]({GRID_FILE})

{video}{model.pictures}

## Use

```
pip install "graf-ccsr[share]"
```

```python
import graf

renderer = graf.load("{WEIGHTS_FILE}")  # safetensors: no pickled code is run
renderer.sample(seed=0, class_name={example}, azimuth=45).pil()[0].save("picture.png")
```

`{CONFIG_FILE}` is the configuration that the weights were trained with, which the file of weights also holds.

## Model

{_table(("", ""), model.facts)}

## Data

{model.data}

## Scores

{_describe_scores(model)}

## Training

{_table(("", ""), [*model.training, *_describe_resources(model.resources)])}

## Licence

`{choices.license}`{_NO_LICENCE if choices.license == "other" else "."} The program's own says nothing of these weights.
"""


_NO_LICENCE = (
    ", because none was named when this folder was made. Whoever publishes it decides, and edits `license` at the top "
    "of this file, or makes the folder again with `graf card --license`."
)


def _describe_scores(model: Model) -> str:
    if not model.measurements:
        return (
            f"The run's files hold no score of the weights of iteration {model.iteration:,}. `graf eval --fid_kid "
            "--heldout` measures them."
        )
    rows = [
        (f"`{score.name}`", f"{score.value:.4g}", score.split, describe_score(score.name), _describe_origin(score))
        for score in model.measurements
    ]
    table = _table(("name", "value", "split", "what it is", "measured with"), rows)
    return f"{table}\n\nAll of the weights of iteration {model.iteration:,}; the files are in `scores/`."


#: fields of a score's provenance that are worth a reader's time -> how they are said; the rest is in the front matter
_ORIGIN = {
    "n_real": "{} photographs",
    "n_fake": "{} renders",
    "photographs": "{} photographs",
    "resolution": "{} pixels",
    "extractor": "features of {}",
    "truncation": "truncation {:g}",
    "seed": "seed {}",
    "caution": "{}",
}


def _describe_origin(score: Measurement) -> str:
    known = {name: value for name in _ORIGIN if (value := score.provenance.get(name)) is not None}
    return ", ".join(_ORIGIN[name].format(value) for name, value in known.items())


def _describe_resources(resources: Resources) -> list[tuple[str, str]]:
    rows = []
    if resources.minutes is not None:
        rows.append(("duration of the steps", f"{resources.minutes:.0f} minutes, without sampling and scoring"))
    for kind, meaning in PEAKS.items():
        if kind in resources.peaks:
            mib, phase = resources.peaks[kind]
            rows.append((f"largest {meaning}", f"{mib:,.0f} MiB" + (f" (phase {phase})" if phase else "")))
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
