"""The configuration of a refresh: one flat model, which is also the form in the Prefect UI."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, field_validator

from pipelines.aspect import ASPECT_RATIOS, AspectRatio
from pipelines.captioners import CaptionConfig
from pipelines.guard import FetchPolicy
from pipelines.sources import Columns
from starflow import __version__
from starflow.config import Config
from starflow.images import MAX_PIXELS
from starflow.urls import host_alone

#: The name that robots.txt and X-Robots-Tag rules address us by.
AGENT_TOKEN = "starflow"
#: Settings that decide the captions of a picture, and those that decide, with these, how they are weighed and whether
#: it is kept.
CAPTION_SETTINGS = ("captioner", "captioner_model", "caption_prompt", "caption_tokens")
FILTER_SETTINGS = (
    *("min_size", "max_aspect_ratio", "min_spread", "min_text", "max_text", "block_words", "languages"),
    *("near_duplicates", "score", "min_score", "alt_weight"),
)
#: X-Robots-Tag directives that keep a picture out (`none` means noindex and nofollow).
OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noml", "none", "noindex", "noimageindex")


class CrawlConfig(Config):
    """Where the pictures come from, and how they are asked for."""

    urls: str = Field(
        title="URL list",
        description="Parquet, CSV, TSV, JSON lines or text file, a folder or a glob of them; local or s3://.",
        min_length=1,
    )
    store: str = Field(title="Store", description="Where snapshots live: a folder or s3://BUCKET/PREFIX.", min_length=1)
    source: Literal["list", "images", "webdataset"] = Field(
        "list",
        title="Kind of source",
        description="list: URLs to fetch. images, webdataset: a folder (local or s3://) of pictures or of tars.",
    )
    url_column: str = Field("url", title="URL column", description="Column with the picture's URL.")
    caption_column: str | None = Field(
        "caption", title="Caption column", description="Column with the alt text; null when there is none."
    )
    licence_column: str = Field(
        "licence",
        title="Licence column",
        description="Column with the licence, carried through to each sample; a list may lack it.",
    )
    extra_columns: tuple[str, ...] = Field(
        (), title="Extra columns", description="More columns to keep with each sample, as JSON."
    )
    attribution: str | None = Field(
        None, title="Attribution", description="To be shown wherever the pictures or a model of them appear."
    )

    contact: str = Field(
        "",
        title="Contact",
        description="E-mail address or web page in the user agent, so that site owners can reach you. "
        "Required for every host that is not in allow_host.",
        pattern=r"^[\x20-\x7e]*$",
    )
    allow_host: tuple[str, ...] = Field(
        (),
        title="Own hosts",
        description="Hosts (NAME or NAME:PORT) that may have private addresses and are asked without limits.",
    )
    block_hosts: tuple[str, ...] = Field(
        (),
        title="Blocked hosts",
        description="Hosts, with their subdomains, that are never asked. A URL that redirects there is given up.",
    )
    respect_robots: bool = Field(True, title="Respect robots.txt", description="Read and obey robots.txt.")
    respect_tdm: bool = Field(
        True, title="Respect TDM reservations", description="Obey the TDM reservation protocol of the W3C group."
    )
    opt_out_directives: tuple[str, ...] = Field(
        OPT_OUT_DIRECTIVES, title="Opt-out directives", description="X-Robots-Tag directives that exclude a picture."
    )
    host_concurrency: int = Field(
        4, title="Connections per host", description="At most so many at once to one host.", ge=1, le=256
    )
    host_rate: float = Field(
        4.0, title="Requests per second and host", description="At most so many; 0 is no limit.", ge=0
    )
    processes: int = Field(2, title="Crawl processes", description="img2dataset processes.", ge=1, le=256)
    threads: int = Field(64, title="Crawl threads", description="Threads of each crawl process.", ge=1, le=1024)
    batch_size: int = Field(
        10_000, title="Batch size", description="URLs of one img2dataset run; the unit that is resumed.", ge=1, le=10**6
    )
    fetch_seconds: float = Field(
        15.0, title="Seconds per URL", description="All a URL may take, redirects and drips included.", gt=0, le=600
    )
    max_bytes: int = Field(
        20 * 2**20, title="Bytes per picture", description="Larger answers are dropped.", ge=1, le=2**30
    )
    max_pixels: int = Field(
        MAX_PIXELS, title="Pixels per picture", description="Checked before decoding.", ge=1, le=MAX_PIXELS
    )
    max_frames: int = Field(
        100,
        title="Frames per picture",
        description="Longer animations are dropped; of others, the first frame counts.",
        ge=1,
    )
    retry_rounds: int = Field(
        1,
        title="Retry rounds",
        description="Time-outs, 429 and 5xx are asked again so often within a refresh.",
        ge=0,
        le=5,
    )
    retry_after: int = Field(
        900, title="Retry after", description="Seconds until a later refresh may retry; doubles each time.", ge=0
    )
    max_attempts: int = Field(5, title="Attempts", description="After so many a URL is given up.", ge=1, le=100)
    revalidate_days: float | None = Field(
        None,
        title="Re-validate after days",
        description="Ask servers again, conditionally, after so long; null: never.",
        ge=0,
    )

    @field_validator("block_hosts")
    @classmethod
    def _canonical_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(host_alone, hosts))

    def columns(self) -> Columns:
        """The mapping of the list's columns."""
        return Columns(
            url=self.url_column, caption=self.caption_column, licence=self.licence_column, extra=self.extra_columns
        )

    def policy(self, taken_down: Iterable[str] = ()) -> FetchPolicy:
        """What a fetch may do; hosts that were taken down are blocked, too."""
        contact = f" (+{self.contact})" if self.contact else ""
        return FetchPolicy(
            user_agent=f"{AGENT_TOKEN}/{__version__}{contact}",
            agent_token=AGENT_TOKEN,
            allow_host=self.allow_host,
            block_hosts=frozenset((*self.block_hosts, *taken_down)),
            max_bytes=self.max_bytes,
            seconds=self.fetch_seconds,
            max_pixels=self.max_pixels,
            max_frames=self.max_frames,
            robots=self.respect_robots,
            tdm=self.respect_tdm,
            opt_out=tuple(directive.lower() for directive in self.opt_out_directives),
            host_concurrency=self.host_concurrency,
            host_rate=self.host_rate,
        )


class RefreshConfig(CaptionConfig, CrawlConfig):
    """A refresh: where the pictures come from, what is kept of them, how they are encoded, and when it is published.

    Its fields are in this order: CrawlConfig's, CaptionConfig's, its own.
    """

    alt_weight: float = Field(
        0.5, title="Weight of alt texts", description="Share of training draws, beside a captioner's 1.", ge=0, le=1
    )

    min_size: int = Field(16, title="Minimum size", description="Pixels of the shorter side.", ge=1)
    max_aspect_ratio: float = Field(4.0, title="Maximum aspect ratio", description="Longer side by shorter.", ge=1)
    min_spread: float = Field(
        1.0,
        title="Minimum spread",
        description="Standard deviation of grey levels (0 to 255); below it is blank.",
        ge=0,
    )
    min_text: int = Field(1, title="Minimum text length", description="Characters of the longest caption.", ge=0)
    max_text: int = Field(
        2000, title="Maximum text length", description="Characters; longer captions are not descriptions.", ge=1
    )
    block_words: tuple[str, ...] = Field(
        (), title="Blocked words", description="Whole words, any case, that exclude a sample when in a caption."
    )
    languages: tuple[str, ...] = Field(
        (),
        title="Languages",
        description="Drop captions clearly in none of these languages (ISO 639 codes, such as en); empty: any.",
    )
    near_duplicates: int | None = Field(
        None,
        title="Near-duplicate distance",
        description="Drop pictures whose perceptual hash differs in at most so many of 64 bits from a kept one; "
        "null: only identical bytes are duplicates.",
        ge=0,
        le=3,
    )
    score: str | None = Field(
        None, title="Score", description="module:function that takes pictures and captions and gives a score each."
    )
    min_score: float = Field(0.0, title="Minimum score", description="Samples that score less are dropped.")

    image_size: int = Field(32, title="Image size", description="Pictures of about so many pixels squared.", ge=8)
    vae: str = Field("emoji", title="VAE", description="emoji (embedded), or a Hugging Face id or path.")
    text_encoder: str | None = Field(
        "minilm",
        title="Text encoder",
        description="Stores the text states of a small encoder: minilm (embedded), a Hugging Face id or path; "
        "null: the trainer computes them.",
    )
    text_length: int = Field(16, title="Text length", description="Tokens of stored text states.", ge=1, le=512)
    aspect_ratios: tuple[AspectRatio, ...] = Field(
        ASPECT_RATIOS,
        title="Aspect ratios",
        description="Shapes, width:height; each picture takes the nearest one.",
        min_length=1,
    )
    patch: int = Field(
        1, title="Patch size", description="Latent sides are multiples of it: the patch size of the flow.", ge=1
    )
    vae_batch: int = Field(
        0,
        title="VAE batch",
        description="Pictures a VAE encodes at once; 0: 16 on CPU, what fits on GPU.",
        ge=0,
    )
    ledger_partitions: int = Field(
        16,
        title="Ledger partitions",
        description="Fixed by the first refresh; 4096 suits a billion URLs.",
        ge=1,
        le=65536,
    )

    gate: Literal["off", "automatic", "person"] = Field(
        "off",
        title="Publish gate",
        description="automatic: publish only within the limits below; person: pause the run in Prefect until somebody "
        "has looked at its artifacts and decided.",
    )
    gate_drop_rate: float = Field(
        0.5, title="Gate: drops", description="Largest share of the asked URLs that gives no sample.", ge=0, le=1
    )
    gate_duplicate_rate: float = Field(
        0.3,
        title="Gate: duplicates",
        description="Largest share of the asked URLs that shows a picture which is there already.",
        ge=0,
        le=1,
    )
    gate_caption_rate: float = Field(
        0.3,
        title="Gate: captions",
        description="Largest share of captions that are empty or repeated, or that the captioner did not give.",
        ge=0,
        le=1,
    )
    gate_removal_rate: float = Field(
        0.1,
        title="Gate: removals",
        description="Largest share of the parent's samples that leaves: gone, changed or opted out at re-validation.",
        ge=0,
        le=1,
    )
    gate_checkpoint: str | None = Field(
        None,
        title="Gate: checkpoint",
        description="STORE/RUN or STORE/RUN@STEP that scores new samples against those of the parent snapshot; "
        "null: likelihoods are not looked at.",
    )
    gate_outlier_rate: float = Field(
        0.1,
        title="Gate: outliers",
        description="Largest share of new samples less typical than 99 of 100 samples of the parent.",
        ge=0,
        le=1,
    )
    gate_samples: int = Field(
        256,
        title="Gate: samples",
        description="New samples that are scored, and old ones.",
        ge=16,
        le=65536,
    )
    gate_hours: float = Field(
        24.0, title="Gate: hours", description="How long a person may take to decide; then it is refused.", gt=0, le=720
    )
    gate_accept: str = Field(
        "",
        title="Gate: accept",
        description="Publish this refused candidate, named as its refusal names it, whatever was measured; "
        "this run then asks for nothing new. Any other candidate is measured as ever, and without a gate refused.",
    )
    gate_discard: str = Field(
        "",
        title="Gate: discard",
        description="Forget this refused candidate, named as its refusal names it, and begin anew: "
        "its URLs are asked again.",
    )

    def digest(self, names: Iterable[str]) -> str:
        """A short hash of these settings: work done under others is done again."""
        return hashlib.sha256(self.model_dump_json(include=set(names)).encode()).hexdigest()[:16]
