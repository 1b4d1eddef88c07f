"""Pieces of tensors: any cut is read from any other, no more than needed, and files that do not fit are refused."""

import itertools
import json
import math
import random
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from prism_mcore.checkpoint.durable import damage
from prism_mcore.checkpoint.files import Workers
from prism_mcore.checkpoint.folder import CheckpointError, state_text
from prism_mcore.checkpoint.index import index_of, index_text, read_index
from prism_mcore.checkpoint.places import Piece
from prism_mcore.checkpoint.stored import StoredTensors, write_pieces

HERE = Path(__file__).parent


def cut(key, shape, axis, parts, ranges, seed=0):
    """A tensor cut into `parts` along an axis, and each part into so many ranges of its flat elements."""
    draw, pieces = random.Random(seed), []
    size = shape[axis] // parts
    for part in range(parts):
        offsets = tuple(part * size if i == axis else 0 for i in range(len(shape)))
        sizes = tuple(size if i == axis else n for i, n in enumerate(shape))
        places = sorted(draw.sample(range(1, math.prod(sizes)), ranges - 1)) if ranges > 1 else []
        for start, stop in itertools.pairwise([0, *places, math.prod(sizes)]):
            pieces.append(Piece(key, shape, offsets, sizes, start, stop))
    return pieces


def take(whole, piece):
    """Elements of a piece by torch's own slicing."""
    box = whole[tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))]
    return box.flatten()[piece.start : piece.stop]


def store(folder, pieces, whole, files=2):
    folder.mkdir()
    written = []
    for number in range(files):
        own, name = pieces[number::files], f"__{number}_0.safetensors"
        with Workers() as workers:
            write_pieces(folder / name, [(p, whole.dtype) for p in own], (take(whole, p) for p in own), workers)
        written += [(p, whole.dtype, name) for p in own]
    (folder / "tensors.json").write_text(index_text(index_of(written)))
    (folder / "state.json").write_text(state_text(1, {}, 1, {}))
    return folder


CUTS = [(0, 1, 1), (0, 2, 3), (1, 2, 3), (1, 4, 1), (0, 4, 5), (1, 4, 7)]


@pytest.mark.parametrize("shape", [(16, 12), (8, 4, 3), (96,)])
@pytest.mark.parametrize("stored_cut", CUTS)
def test_any_cut_is_read_from_any_other_to_the_bit(tmp_path, shape, stored_cut):
    axis, parts, ranges = stored_cut
    whole = torch.randn(shape)
    folder = store(tmp_path / "step", cut("w", shape, min(axis, len(shape) - 1), parts, ranges), whole)
    with StoredTensors(folder) as stored:
        for wanted_axis, wanted_parts, wanted_ranges in CUTS:
            for piece in cut("w", shape, min(wanted_axis, len(shape) - 1), wanted_parts, wanted_ranges, seed=1):
                out = torch.full((piece.count,), math.nan)
                stored.read_piece(piece, out)
                assert torch.equal(out, take(whole, piece)), piece


def test_another_padding_is_read_as_zeros_and_another_dtype_as_itself(tmp_path):
    whole = torch.randn(6, 4)
    with StoredTensors(store(tmp_path / "step", cut("w", (6, 4), 0, 2, 2), whole)) as stored:
        out = torch.full((4, 4), math.nan, dtype=torch.bfloat16)
        stored.read_piece(Piece.of_box("w", (8, 4), (4, 0), (4, 4)), out)
        assert torch.equal(out, torch.cat([whole[4:], torch.zeros(2, 4)]).bfloat16())


@pytest.mark.parametrize(("axis", "columns"), [(0, 8), (1, 4096)])
def test_no_more_is_read_than_is_needed(tmp_path, axis, columns):
    shape, read = (32, columns), []
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    folder = store(tmp_path / "step", cut("w", shape, 0, 2, 3), whole)
    with StoredTensors(folder, on_read=read.append) as stored:
        for piece in cut("w", shape, axis, 2, 4):
            out = torch.empty(piece.count)
            stored.read_piece(piece, out)
            assert torch.equal(out, take(whole, piece))
    assert sum(read) == whole.nbytes


# --- what is refused --------------------------------------------------------------------------------------------------


def change_index(change):
    def harm(folder):
        index = json.loads((folder / "tensors.json").read_text())
        index["w"]["pieces"].sort(key=lambda piece: (piece[1], piece[3]))
        text = change(index["w"], index)
        (folder / "tensors.json").write_text(text or json.dumps(index))

    return harm


def change_file(change):
    def harm(folder):
        file = folder / "__0_0.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        name = next(name for name in header if name != "__metadata__")
        file.write_bytes(change(header, name, content[8 + length :]))

    return harm


def packed(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def renamed(header, name, data):
    header["other"] = header.pop(name)
    return packed(header, data)


def retyped(header, name, data):
    header[name].update(dtype="U8", shape=[4 * header[name]["shape"][0]])
    return packed(header, data)


def reshaped(header, name, data):
    header[name]["shape"] = [1, *header[name]["shape"]]
    return packed(header, data)


def sized_nan(header, name, data):
    header[name]["shape"] = [math.nan]
    return packed(header, data)


def twice(header, name, data):
    return packed(json.dumps(header)[:-1].encode() + b',"' + name.encode() + b'":{}}', data)


PIECES = "pieces"  # each [file, offsets, sizes, start, stop]
HARM = {
    "overlap of ranges": (change_index(lambda w, _: w[PIECES][1].__setitem__(3, w[PIECES][1][3] - 1)), "there twice"),
    "hole between ranges": (change_index(lambda w, _: w[PIECES].pop(1) and None), "not there"),
    "hole at the end": (change_index(lambda w, _: w[PIECES].pop(2) and None), "ends at"),
    "missing box": (change_index(lambda w, _: w[PIECES].__delitem__(slice(3, 6))), "not the whole"),
    "overlap of boxes": (
        change_index(lambda w, _: [p[1].__setitem__(0, 1) for p in w[PIECES][3:]] and None),
        "overlap",
    ),
    "outside": (change_index(lambda w, _: [p[1].__setitem__(0, 7) for p in w[PIECES][3:]] and None), "not part of"),
    "piece twice": (change_index(lambda w, _: w[PIECES].append(w[PIECES][0])), "there twice"),
    "wrong dtype": (change_index(lambda w, _: w.update(dtype="F16")), "the index says torch.float16"),
    "unknown dtype": (change_index(lambda w, _: w.update(dtype="float")), "needed: one of"),
    "NaN": (change_index(lambda w, _: w.update(shape=[math.nan, 4])), "where sizes belong"),
    "fraction": (change_index(lambda w, _: w.update(shape=[8.0, 4])), "where sizes belong"),
    "negative": (change_index(lambda w, _: w.update(shape=[-8, -4])), "where sizes belong"),
    "huge": (change_index(lambda w, _: w.update(shape=[2**60, 4])), "where sizes belong"),
    "no numbers": (change_index(lambda w, _: w.update(shape=[0, 4], pieces=[])), "no elements"),
    "tensor twice": (change_index(lambda w, i: json.dumps(i)[:-1] + ', "w": {}}'), "w is there twice"),
    "elsewhere": (change_index(lambda w, _: w[PIECES][0].__setitem__(0, "../x.safetensors")), "'../x.safetensors'"),
    "another file": (change_index(lambda w, _: w[PIECES][0].__setitem__(0, "state.json")), "needed: a safetensors"),
    "a list": (change_index(lambda w, _: "[]"), "not an index"),
    "no text": (change_index(lambda w, _: "{"), "not an index"),
    "deep": (change_index(lambda w, _: "[" * 100_000), "not an index"),
    "header: renamed": (change_file(renamed), "not there; the index says"),
    "header: retyped": (change_file(retyped), "the index says torch.float32"),
    "header: reshaped": (change_file(reshaped), "the index says torch.float32"),
    "header: NaN": (change_file(sized_nan), "not whole numbers"),
    "header: twice": (change_file(twice), "is there twice"),
    "header: huge": (change_file(lambda h, n, d: struct.pack("<Q", 2**62) + d), "do not hold its header"),
    "header: a pickle": (change_file(lambda h, n, d: b"\x80\x02cos\nsystem\n."), "not a safetensors file"),
    "header: short": (change_file(lambda h, n, d: packed(h, d[:-1])), "truncated"),
    "header: long": (change_file(lambda h, n, d: packed(h, d + b"x")), "too long"),
    "file missing": (lambda folder: (folder / "__0_0.safetensors").unlink(), "cannot be read"),
}


@pytest.mark.parametrize("kind", HARM)
def test_what_does_not_fit_is_refused_by_its_file(tmp_path, kind):
    harm, words = HARM[kind]
    folder = store(tmp_path / "step", cut("w", (8, 4), 0, 2, 3), torch.randn(8, 4))
    harm(folder)
    with pytest.raises(CheckpointError) as error, StoredTensors(folder) as stored:
        stored.read("w", 0, torch.empty(8, 4))
    name = "__0_0.safetensors" if kind.startswith(("header", "file", "wrong dtype")) else "tensors.json"
    assert str(folder / name) in str(error.value) and words in str(error.value), error.value


def test_pieces_that_make_no_whole_are_not_written():
    pieces = cut("w", (8, 4), 1, 2, 3)
    with pytest.raises(ValueError, match=r"w: elements .* are not there"):
        index_of((piece, torch.float32, "x.safetensors") for piece in pieces[1:])


# --- whole checkpoints ------------------------------------------------------------------------------------------------


def train_and_save(groups, folder, bf16):
    """Three steps, a checkpoint, three more; what these gave."""
    from tiny.toy import Toy

    from prism_mcore.checkpoint.save import Checkpoints
    from prism_mcore.train.settings import CheckpointSettings

    toy = Toy(groups, bf16=bf16)
    for step in range(3):
        toy.step(step)
    Checkpoints(folder, CheckpointSettings(), groups).save(3, toy.chunks, toy.optimizer, {"cursor": 17, "lr": 0.05})
    return [toy.step(step) for step in range(3, 6)]


@pytest.mark.parametrize(("world_size", "layout"), [(2, {"tp": 2}), (4, {"optimizer_instances": 2}), (4, {"tp": 2})])
@pytest.mark.parametrize("bf16", [True, False])
def test_every_byte_is_written_once_and_nothing_is_a_pickle(tmp_path, world_size, layout, bf16):
    run_ranks(world_size, train_and_save, tmp_path, bf16, **layout)
    step = tmp_path / "step_00000003"
    index = read_index(step)
    numbers = sum(math.prod(s.shape) for key, s in index.items() if not key.startswith(("optimizer.", "random.")))
    of_random = sum(s.dtype.itemsize * s.shape[0] for key, s in index.items() if key.startswith("random."))
    files = list(step.glob("*.safetensors"))
    data = sum(f.stat().st_size - 8 - struct.unpack("<Q", f.read_bytes()[:8])[0] for f in files)
    assert data == numbers * (2 + 12 if bf16 else 12) + of_random  # an fp32 weight is its own master
    assert {file.suffix for file in step.iterdir()} == {".safetensors", ".json"}
    assert not any(b"PK\x03\x04" in f.read_bytes()[:1000] or f.read_bytes()[:1] == b"\x80" for f in step.iterdir())


def bytes_read(groups, folder):
    from tiny.toy import Toy

    from prism_mcore.checkpoint.load import load

    read = []
    toy = Toy(groups, bf16=True)
    load(folder / "step_00000003", toy.chunks, toy.optimizer, groups, on_read=read.append)
    weights = sum(parameter.nbytes for parameter in toy.parameters().values())
    own = sum(math.prod(t.shape) * 4 for g in toy.optimizer.param_groups for t in g["params"])
    return sum(read), weights, own


def test_a_rank_reads_the_ranges_that_it_needs(tmp_path):
    run_ranks(2, train_and_save, tmp_path, True, tp=2)
    for world_size in (2, 4):
        for read, weights, own in run_ranks(world_size, bytes_read, tmp_path):  # rows whole: of 16 or 32 bytes here
            assert read <= 1.1 * (weights + 3 * own)


def resume_old(groups, folder):
    from tiny.toy import Toy

    from prism_mcore.checkpoint.load import load

    toy = Toy(groups, bf16=True)
    toy.step(99)
    assert load(folder / "step_00000003", toy.chunks, toy.optimizer, groups).state == {"cursor": 17, "lr": 0.05}
    return [toy.step(step) for step in range(3, 6)]


@pytest.mark.parametrize("layout", [{"tp": 2}, {}, {"pp": 2}])
def test_a_checkpoint_of_version_1_is_resumed(tmp_path, layout):
    """Written by megatron-core's `fully_reshardable` on two tensor-parallel ranks."""
    with tarfile.open(HERE / "version_1.tar.xz") as archive:
        archive.extractall(tmp_path / "old", filter="data")
    assert damage(tmp_path / "old" / "step_00000003") == []
    straight = run_ranks(2, train_and_save, tmp_path / "new", True, tp=2)[0]  # tensor-parallel ranks have the same
    resumed = run_ranks(2, resume_old, tmp_path / "old", **layout)
    losses = (
        resumed[0] if layout == {"tp": 2} else [(sum(loss for loss, _ in step),) for step in zip(*resumed, strict=True)]
    )
    tolerance = 1e-6 if layout == {"tp": 2} else 1e-2  # sums of bf16 products are in another order
    found, expected = (torch.tensor([step[0] for step in steps]) for steps in (losses, straight))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


PEAK = """
import resource, sys, threading, torch
from pathlib import Path
from prism_mcore.checkpoint.files import Workers
from prism_mcore.checkpoint.places import Piece
from prism_mcore.checkpoint.stored import StoredTensors, write_pieces
from prism_mcore.checkpoint.index import index_of, index_text
from prism_mcore.checkpoint.folder import state_text

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, shape = Path(sys.argv[1]), (96, 2**20)
piece = Piece.of_box("w", shape, (0, 0), shape)
with Workers() as workers:  # once before, for what imports and threads take
    write_pieces(folder / "x", [(Piece.of_box("w", (4,), (0,), (4,)), torch.float32)], [torch.ones(4)], workers)
tensor = torch.ones(shape)
before = peak()
with Workers() as workers:
    write_pieces(folder / "a.safetensors", [(piece, tensor.dtype)], [tensor], workers)
(folder / "tensors.json").write_text(index_text(index_of([(piece, tensor.dtype, "a.safetensors")])))
(folder / "state.json").write_text(state_text(1, {}, 1, {}))
with StoredTensors(folder) as stored:
    stored.read_piece(Piece("w", shape, (0, 0), shape, 77, tensor.numel()), tensor.view(-1)[77:])
    stored.read_piece(Piece.of_box("w", shape, (0, 0), (96, 2**19)), tensor.view(-1)[: 96 * 2**19].bfloat16())
print(tensor.nbytes, peak() - before)
"""


def test_memory_beside_a_shard_is_a_few_blocks(tmp_path):
    """Of 400 MB, with another dtype to convert, which takes half the size here for the result itself."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    size, more = map(int, done.stdout.split())
    assert size > 400e6
    assert more < 96 * 2**20 + size / 4 + 64e6
