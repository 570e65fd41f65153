"""The page about the store is enough to read one: its code, run as printed, finds what training reads."""

import hashlib
import textwrap
from pathlib import Path

import numpy as np

from starflow.objectstore import open_store
from starflow.parts import LayerPlan, add_layer
from starflow.reader import SnapshotReader
from starflow.removal import take_down
from starflow.shardindex import held_out_hash
from starflow.snapshots import load_snapshot, publish
from starflow.takedowns import Takedowns
from tests.starflow.test_upkeep import GRID, make_part, name

PAGE = Path(__file__).parents[2] / "docs" / "store.md"


def test_its_code_reads_a_store(tmp_path):
    store = open_store(str(tmp_path / "store"))
    a, b = make_part(store, 0)[0], make_part(store, 1000)[0]
    layer = add_layer(store, b, LayerPlan(origin="eye", version="1", weight=2.0), [f"seen {row}" for row in range(40)])
    first = publish(store, parent=None, parts=[a], image_size=16)
    publish(store, parent=first, parts=[a, b.model_copy(update={"captions": (*b.captions, layer)})], image_size=16)
    take_down(store, Takedowns([("id", name(17))]))

    section = PAGE.read_text().partition("## Reading without this project")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ") or not line]
    values = {}
    exec(textwrap.dedent("\n".join(lines)).replace("STORE", store.url), values)
    found = values["found"]

    reader = SnapshotReader(store, load_snapshot(store), tmp_path / "cache")
    batch = reader.gather(GRID, np.arange(reader.count(GRID)))
    assert set(found) == set(batch.ids)
    assert len(found) == 79
    for row, id in enumerate(batch.ids):
        url, mean, std, captions = found[id]
        assert url.endswith(f"-{next(n for n in (*range(40), *range(1000, 1040)) if name(n) == id)}")
        assert np.array_equal(mean, batch.mean[row])
        assert np.array_equal(std, batch.std[row])
        assert max(captions)[2] == batch.captions[row]


def test_the_hash_of_held_out_samples_is_as_printed():
    digest = hashlib.blake2b(name(1).encode("ascii"), digest_size=2, person=b"held-out").digest()
    assert "personalisation `held-out`" in PAGE.read_text()
    assert held_out_hash(name(1)) == int.from_bytes(digest, "big")
