"""The `starflow` sub-commands that use a flow: sample, score and what else it can do."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starflow.console import console, print_json
from starflow.errors import ConfigError, StarflowError
from starflow.model_commands import export, import_, model, verify

if TYPE_CHECKING:
    from PIL import Image

    from starflow.decoding import Progress
    from starflow.generate import Generator, Grid, ImageScore

__all__ = [
    "decode",
    "encode",
    "export",
    "import_",
    "inpaint",
    "interpolate",
    "model",
    "sample",
    "score",
    "typicality",
    "verify",
]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}

Checkpoint = Annotated[
    str,
    typer.Option("--checkpoint", "-c", help="STORE/RUN, STORE/RUN@STEP, or a folder of an exported or imported model."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; on cuda the flow runs in bfloat16.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


class MethodName(StrEnum):
    """How noise becomes data."""

    sequential = "sequential"
    jacobi = "jacobi"


def _picture_name(path: Path) -> Path:
    """Before minutes of work: raises ConfigError for a file name whose ending names no picture format."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--out {path}: {path.suffix or 'no ending'} is not a picture format; write PICTURE.png")
    return path


PictureOut = Annotated[Path, typer.Option("--out", "-o", callback=_picture_name, help="Picture to write.")]


def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts; class numbers for ImageNet models.")],
    checkpoint: Checkpoint,
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=_picture_name, help="Picture to write: all samples in a grid.")
    ] = Path("sample.png"),
    guidance: Annotated[float, typer.Option(min=0, help="Weight of classifier-free guidance; 0 is none.")] = 2.0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures of each prompt.")] = 1,
    seed: Seed = 0,
    aspect: Annotated[str, typer.Option(help="Aspect ratio, width:height.")] = "1:1",
    method: Annotated[MethodName, typer.Option(help="jacobi is faster, sequential exact.")] = MethodName.jacobi,
    denoise: Annotated[bool, typer.Option(help="Remove the noise that the flow learned with the latents.")] = True,
    decoder: Annotated[
        str,
        typer.Option(help="Fine-tuned decoder, STORE/NAME; auto: the store's own, none: the flow's score instead."),
    ] = "auto",
    folder: Annotated[Path | None, typer.Option(help="Also write each picture to this folder.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Draw pictures for prompts."""
    from starflow.images import picture_grid

    generator = _open(checkpoint, device, decoder)
    wanted = [prompt for prompt in prompts for _ in range(count)]
    grid = _aspect(generator, aspect)
    with _progress("sampling", generator.tokens(len(wanted), grid)) as progress:
        pictures = generator.sample(wanted, guidance, seed, grid, method.value, denoise=denoise, progress=progress)
    files = _write_all(pictures, folder) if folder else []
    scale = max(1, 256 // max(pictures[0].size))
    _write(picture_grid(pictures, wanted, columns=min(8, max(count, 4)), scale=scale), out)
    if as_json:
        print_json({"out": str(out), "files": files, "prompts": wanted, "seed": seed, "guidance": guidance})


def score(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or one folder of pictures.")],
    checkpoint: Checkpoint,
    caption: Annotated[
        list[str] | None, typer.Option(help="One for all pictures, or one each; none: no caption.")
    ] = None,
    maps: Annotated[Path | None, typer.Option(help="Folder for heat maps of nats per token.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Exact log-likelihood of images given captions, without them, and the difference."""
    paths = _image_paths(images)
    captions = _captions(caption or [""], len(paths))
    generator = _open(checkpoint, device)
    scores = generator.score([_read(path) for path in paths], captions, seed)
    if maps is not None:
        _write_maps(scores, paths, maps)
    rows = [{"image": str(path), **row.to_dict()} for path, row in zip(paths, scores, strict=True)]
    if as_json:
        print_json(rows)
        return
    print(f"{'nats':>10} {'no caption':>10} {'explained':>10} {'bits/dim':>9}  image")
    for path, row in zip(paths, scores, strict=True):
        print(
            f"{row.nats:10.2f} {row.nats_without_caption:10.2f} {row.explained:10.2f} {row.bits_per_dim:9.4f}  {path}"
        )


def encode(
    images: Annotated[list[Path], typer.Argument(help="Pictures of one shape, or one folder of them.")],
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="safetensors file for the noise (B, C, H, W).")],
    caption: Annotated[list[str] | None, typer.Option(help="One for all pictures, or one each.")] = None,
    device: Device = "cpu",
) -> None:
    """Image to noise. The file remembers the captions; `starflow decode` inverts it."""
    from safetensors.torch import save_file

    from starflow import likelihood

    paths = _image_paths(images)
    captions = _captions(caption or [""], len(paths))
    generator = _open(checkpoint, device)
    pictures = [_read(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if generator.grid_of(picture) != generator.grid_of(pictures[0]):
            raise ConfigError(
                f"{path} of {picture.width} x {picture.height} pixels has another aspect ratio than {paths[0]} of "
                f"{pictures[0].width} x {pictures[0].height} pixels; encode pictures of one aspect ratio at a time"
            )
    x = generator.latents(pictures, seed=None)
    noise = likelihood.encode(generator.model, x, generator.condition(captions))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"noise": noise.cpu().clone()}, out, metadata={"captions": json.dumps(captions)})
    console.print(f"wrote {out}: noise {tuple(noise.shape)}")


def decode(
    noise: Annotated[Path, typer.Argument(help="File written by `starflow encode`.")],
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Option("--folder", help="Folder for the pictures.")],
    caption: Annotated[list[str] | None, typer.Option(help="Other captions than those remembered.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Noise to image."""
    from safetensors import SafetensorError, safe_open

    from starflow import likelihood

    try:
        with safe_open(noise, framework="pt") as file:
            z, remembered = file.get_tensor("noise"), json.loads((file.metadata() or {}).get("captions", '[""]'))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{noise} is not a file of `starflow encode`: {error}") from error
    if z.ndim != 4:
        raise ConfigError(f"{noise} holds noise of shape {tuple(z.shape)}; `starflow encode` writes (B, C, H, W)")
    generator = _open(checkpoint, device)
    text = generator.condition(_captions(caption or remembered, len(z)))
    height, width = z.shape[2:]
    with _progress("decoding", generator.batch_tokens((height, width))) as progress:
        x = likelihood.decode(generator.model, z.to(generator.device), text, progress=progress)
    files = _write_all(generator.pictures(x), folder)
    if as_json:
        print_json({"files": files})


def interpolate(
    first: Annotated[Path, typer.Argument(help="Picture at the start.")],
    last: Annotated[Path, typer.Argument(help="Picture at the end.")],
    checkpoint: Checkpoint,
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=_picture_name, help="Picture to write: all steps in a row.")
    ] = Path("interpolation.png"),
    caption: Annotated[list[str] | None, typer.Option(help="One for both pictures, or one each.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Pictures, both ends included.")] = 8,
    device: Device = "cpu",
) -> None:
    """Pictures between two images, in noise space."""
    from starflow.images import picture_grid

    start, end = _captions(caption or [""], 2)
    generator = _open(checkpoint, device)
    ends = _read(first), _read(last)
    with _progress("interpolating", generator.batch_tokens(generator.grid_of(ends[0]))) as progress:
        pictures = generator.interpolate(ends, (start, end), steps, progress)
    _write(picture_grid(pictures, columns=steps, scale=max(1, 128 // max(pictures[0].size))), out)


def inpaint(
    image: Annotated[Path, typer.Argument(help="Picture to repair.")],
    mask: Annotated[Path, typer.Argument(help="Picture that is white where to fill in.")],
    checkpoint: Checkpoint,
    out: PictureOut = Path("inpainted.png"),
    caption: Annotated[str, typer.Option(help="What the whole picture shows.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Proposals for the hole; more is better and slower.")] = 8,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Fill in the masked part of an image."""
    generator = _open(checkpoint, device)
    picture = _read(image)
    with _progress("inpainting", rounds * generator.batch_tokens(generator.grid_of(picture))) as progress:
        filled = generator.inpaint(picture, _read(mask), caption, rounds, seed, progress)
    _write(filled, out)


def typicality(
    images: Annotated[list[Path], typer.Argument(help="Pictures to judge, or a folder of them.")],
    checkpoint: Checkpoint,
    reference: Annotated[Path, typer.Option(help="Folder of pictures that are as they should be.")],
    level: Annotated[float, typer.Option(min=0, max=1, help="Flag pictures whose p-value is at most this.")] = 0.01,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the table as CSV.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Find images that are unlikely, or too likely, for a reference set."""
    generator = _open(checkpoint, device)
    rows = _typicality_rows(generator, _image_paths(images), _image_paths([reference]), level, seed)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        flag = "outlier" if row["outlier"] else ""
        print(f"{row['percentile']:6.1f} %  p = {row['p_value']:.4f}  {flag:8} {row['image']}")


def _typicality_rows(
    generator: Generator, images: list[Path], reference: list[Path], level: float, seed: int
) -> list[dict[str, Any]]:
    import torch

    from starflow.likelihood import Typicality

    def nats(paths: list[Path]) -> torch.Tensor:
        scores = generator.score([_read(path) for path in paths], [""] * len(paths), seed)
        return torch.tensor([-row.bits_per_dim for row in scores], dtype=torch.float64)

    test, values = Typicality(nats(reference)), nats(images)
    columns = zip(images, values, test.percentile(values), test.p_value(values), strict=True)
    return [
        {
            "image": str(path),
            "id": hashlib.sha256(path.read_bytes()).hexdigest(),  # of the sample, in a snapshot and for `takedown`
            "bits_per_dim": -float(value),
            "percentile": float(percentile),
            "p_value": float(p),
            "outlier": float(p) <= level,
        }
        for path, value, percentile, p in columns
    ]


def _open(checkpoint: str, device: str, decoder: str = "none") -> Generator:
    import torch

    from starflow.generate import Generator

    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    here += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if device not in here:
        raise ConfigError(f"--device {device} does not exist here; choose one of {', '.join(here)}")
    console.print(f"loading {checkpoint}", highlight=False)
    return Generator.open(checkpoint, device, torch.float32 if device == "cpu" else torch.bfloat16, decoder)


def _aspect(generator: Generator, aspect: str) -> Grid:
    from starflow.presets import aspect_grid

    width, colon, height = aspect.partition(":")
    if not (colon and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"aspect {aspect!r} is not width:height, for example 3:2")
    return aspect_grid(generator.model.config, (int(width), int(height)))


def _image_paths(given: list[Path]) -> list[Path]:
    paths = []
    for path in given:
        if path.is_dir():
            paths += sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            paths.append(path)
    if not paths:
        raise ConfigError(f"no pictures in {', '.join(map(str, given))}")
    return paths


def _captions(captions: list[str], count: int) -> list[str]:
    if len(captions) not in (1, count):
        raise ConfigError(f"{len(captions)} captions for {count} pictures; give one for all or one each")
    return captions * count if len(captions) == 1 else captions


def _read(path: Path) -> Image.Image:
    from starflow.images import ImageError, decode_image

    try:
        return decode_image(path.read_bytes())
    except (OSError, ImageError) as error:
        raise StarflowError(f"picture {path} cannot be read: {error}") from error


def _write(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    console.print(f"wrote {path}")


def _write_all(pictures: list[Image.Image], folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index:04d}.png" for index in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    return [str(file) for file in files]


def _write_maps(scores: list[ImageScore], paths: list[Path], folder: Path) -> None:
    from starflow.generate import heat_map

    folder.mkdir(parents=True, exist_ok=True)
    for index, (row, path) in enumerate(zip(scores, paths, strict=True)):
        for kind, values in (("nats", row.per_token), ("explained", row.per_token_explained)):
            size = (values.shape[1] * 32, values.shape[0] * 32)
            heat_map(values, size).save(folder / f"{index:04d}-{path.stem}-{kind}.png")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if not console.is_terminal:  # no bar in a log file
        console.print(f"{what} {total} tokens")
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{what}, tokens", total=total)
        yield lambda tokens: bar.advance(task, tokens)
