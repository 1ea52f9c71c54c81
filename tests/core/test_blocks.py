"""Blocks on disk: read as they were written, whoever wrote them; what isn't blocks is told before it is used."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from lorakit.core import artifacts, blocks, disk
from lorakit.core.blocks import TEMPLATE, VALIDATION, Batch, Blocks, ShardMaker
from lorakit.core.config import PrepareConfig
from lorakit.core.errors import ArtifactDamaged, InputRefused, Mismatch, UsageError
from lorakit.core.tokenization import Document

CONFIG = PrepareConfig.resolve((None, {"dataset": "rows.jsonl", "tokenizer": "any", "block_size": 8}))


def document(first: int, length: int) -> Document:
    return Document(np.arange(first, first + length, dtype=np.uint32), np.arange(length) > 0)


def made(folder: Path, count: int, *, tokenizer: str = "t", template: str | None = None, first: int = 0) -> Path:
    """A blocks folder of `count` training blocks and one for validation."""
    files = []
    for part, number in (("blocks", count), (VALIDATION, 1)):
        maker = ShardMaker(part, 8, pad_id=99)
        for index in range(number):
            files += maker.add([document(first + index * 10, 5), document(first + index * 10 + 5, 2)])
        files += maker.rest()
    if template:
        files.append((TEMPLATE, template.encode()))
    parents = {"tokenizer": tokenizer}
    artifacts.commit(folder, "blocks", files, config=CONFIG, parents=parents, facts={})
    return folder


def test_the_first_token_of_a_document_is_never_trained_whoever_wrote_the_blocks(tmp_path: Path) -> None:
    shard = {
        "tokens": np.arange(16, dtype=np.uint32).reshape(2, 8),
        "trained": np.ones((2, 8), dtype=np.uint8),
        "document": np.array([[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8], dtype=np.uint16),
    }
    files = [("blocks-00000.safetensors", save(shard))]
    artifacts.commit(tmp_path / "out", "blocks", files, config=CONFIG, parents={"tokenizer": "t"}, facts={})
    batch = Blocks(tmp_path / "out").batch([1, 0])
    assert batch.trained_BT.astype(int).tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0, 1, 1]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.ids_BT[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_many_shards_read_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Blocks(made(tmp_path / "one", 7))
    monkeypatch.setattr(blocks, "_SHARD_BYTES", 3 * 8 * 7)
    many = Blocks(made(tmp_path / "many", 7))
    assert len(list((tmp_path / "many").glob("blocks-*"))) == 3
    assert len(one) == len(many) == 7
    order = [6, 0, 3, 2]
    np.testing.assert_array_equal(many.batch(order).ids_BT, one.batch(order).ids_BT)
    assert one.batch([1]).ids_BT.tolist() == [[10, 11, 12, 13, 14, 15, 16, 99]]
    assert one.batch([1]).positions_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0]]


def test_several_folders_read_one_after_the_other(tmp_path: Path) -> None:
    folders = [made(tmp_path / "a", 2), made(tmp_path / "b", 3, first=1000)]
    both = Blocks(folders)
    assert len(both) == 5
    assert both.batch(range(5)).ids_BT[:, 0].tolist() == [0, 10, 1000, 1010, 1020]
    assert both.largest_id() == 1026
    assert (
        len({both.fingerprint, Blocks(folders[::-1]).fingerprint, *(Blocks(one).fingerprint for one in folders)}) == 4
    )


def test_the_held_out_part_is_a_part_of_its_own(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", 2)
    assert (len(Blocks(folder)), len(Blocks(folder, VALIDATION))) == (2, 1)


def test_another_part_of_the_same_folders_isnt_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, original = made(tmp_path / "a", 2), disk.sha256
    hashed: list[str] = []

    def sha256(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(disk, "sha256", sha256)
    trained = Blocks(folder)
    held_out = trained.of(VALIDATION)
    assert sorted(hashed) == sorted(set(hashed))
    assert "validation-00000.safetensors" in hashed
    assert (len(trained), len(held_out)) == (2, 1)
    assert held_out.fingerprint == trained.fingerprint
    for one, other in zip(held_out.arrays(0), Blocks(folder, VALIDATION).arrays(0), strict=True):
        assert np.array_equal(one, other)


def test_folders_that_dont_belong_together_are_refused(tmp_path: Path) -> None:
    one = made(tmp_path / "a", 1)
    for name, other in (("tokenizer", {"tokenizer": "u"}), ("template", {"template": "{{ messages }}"})):
        with pytest.raises(Mismatch, match=f"found blocks of another {name}"):
            Blocks([one, made(tmp_path / name, 1, **other)])  # type: ignore[arg-type]


# Opening


def test_a_folder_of_another_kind_is_no_blocks_folder(tmp_path: Path) -> None:
    artifacts.commit(
        tmp_path / "adapter", "adapter", [("a", b"b")], config=CONFIG, parents={"tokenizer": "t"}, facts={}
    )
    with pytest.raises(InputRefused, match="found adapter, need blocks") as caught:
        Blocks(tmp_path / "adapter")
    assert "lorakit prepare" in caught.value.hint


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: None], ids=["folder", "file", "nothing"])
def test_what_isnt_an_artifact_is_no_blocks_folder(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(InputRefused, match=r"need a (lorakit artifact|blocks folder)") as caught:
        Blocks(tmp_path / "x")
    assert "makes blocks" in caught.value.hint


def test_a_flipped_bit_in_a_shard_is_found(tmp_path: Path) -> None:
    shard = made(tmp_path / "a", 2) / "blocks-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ArtifactDamaged, match="blocks-00000"):
        Blocks(tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [
        b"no safetensors",
        save({"tokens": np.zeros((1, 8), np.uint32), "trained": np.zeros((1, 8), np.uint8)}),
        save({name: np.zeros((1, 9), np.uint8) for name in ("tokens", "trained", "document")}),
        save({name: np.zeros((1 + (name == "tokens"), 8), np.uint8) for name in ("tokens", "trained", "document")}),
    ],
    ids=["format", "names", "size", "shapes"],
)
def test_a_shard_that_isnt_blocks_is_told_before_it_is_used(content: bytes, tmp_path: Path) -> None:
    files = [("blocks-00000.safetensors", content)]
    artifacts.commit(tmp_path / "x", "blocks", files, config=CONFIG, parents={"tokenizer": "t"}, facts={})
    with pytest.raises(ArtifactDamaged, match="blocks-00000"):
        Blocks(tmp_path / "x")


def test_a_batch_knows_where_its_documents_end() -> None:
    """As flash attention takes them: of all rows end to end, padding as a document of its own."""
    positions = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    batch = Batch(positions, positions, positions > 0)
    assert batch.ends.tolist() == [0, 3, 5, 6, 12]
    assert batch.ends.dtype == np.int32
    assert batch.longest == 6


def test_a_folder_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "blocks", 2)
    (tmp_path / "link").symlink_to(folder)
    for again in (folder, tmp_path / "link"):
        with pytest.raises(UsageError, match="twice"):
            Blocks([folder, again])
