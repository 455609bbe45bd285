"""Public checkpoints: fetched from a server, resumed, verified, converted once; other projects' files by format."""

import hashlib
import http.client
import importlib
import inspect
import io
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from steadyflow import cli
from steadyflow.checkpoints import Public, load
from steadyflow.checkpoints.download import download, record, verify
from steadyflow.checkpoints.formats import format_names
from steadyflow.jobs.prepare_checkpoint import flops
from steadyflow.networks import GET
from steadyflow.paths import ConditionalOT

CONFIGS = Path(__file__).parents[2] / "configs" / "checkpoint"
DATA = bytes(range(256)) * 5000  # 1.28 MB: more than one chunk


class Server(ThreadingHTTPServer):
    """Serves `data` with ranges; `breaks` cuts the next answers off after so many bytes.

    One that is not `careful` sends the rest of another version too; `shift` moves what it sends of a range, of which
    it sends so many bytes at `most`.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.version, self.careful, self.shift = DATA, {"ETag": '"1"'}, True, 0
        self.most: int | None = None
        self.kind, self.redirect = "application/octet-stream", ""
        self.breaks: list[int] = []
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        if "none" in self.path:
            self.send_error(404)
            return
        if "busy" in self.path:
            self.send_error(503)
            return
        if self.server.redirect:
            self.send_response(302)
            self.send_header("Location", self.server.redirect)
            self.end_headers()
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0  # type: ignore[index]
        if self.server.careful and self.headers["If-Range"] not in (None, *self.server.version.values()):
            start = 0
        size = len(self.server.data)
        self.send_response(206 if 0 < start < size else 416 if start else 200)
        if start:
            where = f"{start + self.server.shift}-{size - 1}" if start < size else "*"
            self.send_header("Content-Range", f"bytes {where}/{size}")
        body = self.server.data[start + self.server.shift * (start > 0) :][: self.server.most if start else None]
        for name, value in (self.server.version | {"Content-Type": self.server.kind}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.breaks.pop() if self.server.breaks else None])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    it = Server()
    thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield it
    it.shutdown()
    thread.join()
    it.server_close()


def test_a_broken_download_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    file, seen = tmp_path / "a" / "weights.pt", []
    server.breaks = [1_100_000]
    with pytest.raises(ValueError, match=r"truncated download of .*: 1100000 of 1280000 bytes are here; .* goes on"):
        download(server.url, file)
    assert not file.exists()
    server.most = 50_000
    with pytest.raises(ValueError, match="1150000 of 1280000 bytes are here"):
        download(server.url, file)
    server.most = None
    download(server.url, file, lambda have, total: seen.append((have, total)))
    assert file.read_bytes() == DATA
    assert server.ranges == [None, "bytes=1100000-", "bytes=1150000-"]
    assert seen[-1] == (1280000, 1280000)
    assert {p.name for p in file.parent.iterdir()} == {"weights.pt", ".lock"}
    file.rename(file.with_name("weights.pt.part"))  # killed when all of it was there
    file.with_name("weights.pt.version").write_text('"1"')
    download(server.url, file)
    assert file.read_bytes() == DATA
    assert server.ranges[3:] == ["bytes=1280000-"]


@pytest.mark.parametrize(
    ("before", "after", "requests"),
    [
        ({}, {"version": {"ETag": '"2"'}}, 2),
        ({}, {"version": {"ETag": '"2"'}, "careful": False}, 3),  # it does not know If-Range
        ({"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", "ETag": 'W/"1"'}, {"version": {"Last-Modified": "now"}}, 2),
        ({"ETag": 'W/"1"'}, {"careful": False}, 2),  # a weak tag names no bytes
        ({}, {"shift": -1}, 3),
    ],
)
def test_another_file_or_range_is_begun_anew(
    server: Server, tmp_path: Path, before: dict[str, str], after: dict[str, Any], requests: int
) -> None:
    server.version, server.breaks = before or server.version, [500_000]
    with pytest.raises(ValueError, match="truncated download"):
        download(server.url, tmp_path / "it")
    server.data = DATA[::-1]
    for name, value in after.items():
        setattr(server, name, value)
    download(server.url, tmp_path / "it")
    assert (tmp_path / "it").read_bytes() == DATA[::-1]
    assert len(server.ranges) == requests


def test_what_came_wrong_does_not_stay(server: Server, tmp_path: Path) -> None:
    server.data, right = DATA[::-1], hashlib.sha256(DATA).hexdigest()
    with pytest.raises(
        ValueError, match=rf"its config says sha256 {right}, found \w+; what came is deleted, try again"
    ):
        download(server.url, tmp_path / "it", None, right)
    server.data, server.kind = b"<html>log in</html>", "text/html; charset=utf-8"
    with pytest.raises(ValueError, match=rf"answers with a web page; fetch the file by hand to {tmp_path}/it"):
        download(server.url, tmp_path / "it", None, right)
    server.data, server.kind = DATA, "text/plain"
    server.version["Content-Encoding"] = "gzip"
    with pytest.raises(ValueError, match=rf"answers in gzip, unasked; fetch the file by hand to {tmp_path}/it"):
        download(server.url, tmp_path / "it", None, right)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    del server.version["Content-Encoding"]
    download(server.url, tmp_path / "it", None, right)


def test_only_one_process_fetches_into_a_folder(server: Server, tmp_path: Path) -> None:
    code = f"import fcntl; f = open('{tmp_path}/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=1); input()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code], **pipes) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match=f"another process is fetching into {tmp_path} now; wait"):
            download(server.url, tmp_path / "it")
        other.communicate(b"\n")
    download(server.url, tmp_path / "it")


def test_https_is_not_left(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.redirect = "ftp://127.0.0.1:9/there"
    with pytest.raises(ValueError, match=r"redirects to ftp://\S+/there, which is not http: it is not followed"):
        download(server.url, tmp_path / "it")

    class Plain(http.client.HTTPConnection):  # https in name: a certificate is not what is tested
        def __init__(self, host: str, timeout: float, **_: Any) -> None:
            super().__init__(host, timeout=timeout)

    monkeypatch.setattr(http.client, "HTTPSConnection", Plain)
    server.redirect = server.url + "/there"
    with pytest.raises(ValueError, match=r"https://\S+ redirects to http://\S+/there, which is not https"):
        download(server.url.replace("http", "https"), tmp_path / "it")
    assert len(server.ranges) == 2


def test_without_a_connection_the_file_to_put_is_named(server: Server, tmp_path: Path) -> None:
    refusals = {"none": "answers 404", "busy": "answers 503 Service Unavailable; try again later; without"}
    known = [(f"{server.url}/{name}", said) for name, said in refusals.items()]
    for url, said in (*known, ("http://127.0.0.1:9/weights.pt", "cannot reach")):
        with pytest.raises(FileNotFoundError, match=rf"{said}.* put {url} at {tmp_path}/it"):
            download(url, tmp_path / "it")


def test_a_hash_is_published_or_recorded_and_checked_ever_after(tmp_path: Path) -> None:
    file, sha256 = tmp_path / "it", hashlib.sha256(DATA).hexdigest()
    file.write_bytes(DATA)
    with pytest.raises(ValueError, match=rf"its config says sha256 {'0' * 64}, found {sha256}; delete the file"):
        verify(file, "0" * 64)
    with pytest.raises(ValueError, match="its config says md5 00, found"):
        verify(file, None, "00")
    assert verify(file, sha256.upper(), hashlib.md5(DATA).hexdigest()) == verify(file, None) == sha256
    record(file, sha256)
    assert (tmp_path / "it.sha256").read_text() == f"{sha256}  it\n"
    file.write_bytes(DATA[:-1])
    with pytest.raises(ValueError, match=rf"it.sha256 \(to be deleted if .*\) says sha256 {sha256}, found"):
        verify(file, None)


def test_every_public_checkpoint_says_what_its_format_asks_for() -> None:
    """Each config names itself, a page, and the arguments of its format; where it can be fetched, by https."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    configs = {file.stem: yaml.load(file.read_text(), Loader=loader) for file in CONFIGS.glob("*.yaml")}
    found = {name: about for name, about in configs.items() if about["_target_"] == "steadyflow.checkpoints.public"}
    assert len(found) > 50
    for name, about in found.items():
        known = {k: v for k, v in about.items() if k not in ("defaults", "_target_", "_convert_")}
        source = Public(**known)
        assert (source.name, source.folder) == (name, "${data_dir}/../checkpoints")
        assert source.page.startswith("https://")
        assert all(url is None or url.startswith("https://") for url in source.sources().values())
        assert {"resolution", "classes", "data_range", "fid", "licence", "source"} <= source.card.keys()
        if source.format in format_names():
            read = importlib.import_module(f"steadyflow.checkpoints.formats.{source.format}").read
            inspect.signature(read).bind("file", **source.arguments)


def ddpm_state(width: int = 32) -> dict[str, Tensor]:
    """A DDPM U-Net of one level and one block a level, 8 x 8, in pytorch_diffusion's names."""
    torch.manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {"conv_in": (width, 3, 3, 3), "conv_out": (3, width, 3, 3)}
    sizes |= {"temb.dense.0": (4 * width, width), "temb.dense.1": (4 * width, 4 * width), "norm_out": (width,)}
    for block, channels in [("down.0.block.0", 1), ("mid.block_1", 1), ("mid.block_2", 1), *UP]:
        sizes |= {f"{block}.norm1": (channels * width,), f"{block}.conv1": (width, channels * width, 3, 3)}
        sizes |= {f"{block}.temb_proj": (width, 4 * width), f"{block}.norm2": (width,)}
        sizes |= {f"{block}.conv2": (width, width, 3, 3)}
        sizes |= {f"{block}.nin_shortcut": (width, 2 * width, 1, 1)} if channels == 2 else {}
    sizes |= {"mid.attn_1.norm": (width,)} | {
        f"mid.attn_1.{k}": (width, width, 1, 1) for k in ("q", "k", "v", "proj_out")
    }
    state = {f"{name}.weight": torch.randn(size) / 10 for name, size in sizes.items()}
    return state | {f"{name}.bias": torch.randn(size[0]) / 10 for name, size in sizes.items()}


UP = [(f"up.0.block.{i}", 2) for i in range(2)]


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.fixture
def run(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> Any:
    """JOB and overrides, with a config of a public checkpoint `tiny` -> exit code, what is printed on both streams."""
    server.data = saved(ddpm_state())
    card = {"resolution": 8, "classes": 0, "licence": "MIT", "source": "nobody", "fid": 3.17}
    about = {
        "name": "tiny",
        "folder": "${data_dir}/checkpoints",
        "url": server.url,
        "page": "http://page",
        "sha256": None,
    }
    about |= {"format": "ddpm", "arguments": {"image_size": 8}, "card": card}
    config = {"_target_": "steadyflow.checkpoints.public", "_convert_": "all"} | about
    (tmp_path / "configs" / "checkpoint").mkdir(parents=True)
    (tmp_path / "configs" / "checkpoint" / "tiny.yaml").write_text(yaml.safe_dump(config))

    def call(job: str, *overrides: str) -> tuple[int, str]:
        folders = [f"data_dir={tmp_path}", f"hydra.run.dir={tmp_path}/run"]
        code = cli.main([job, "--config-dir", str(tmp_path / "configs"), *overrides, *folders])
        out = capsys.readouterr()
        return code, out.out + out.err

    return call


def test_prepare_fetches_verifies_converts_and_exports(run: Any, server: Server, tmp_path: Path) -> None:
    place, state = tmp_path / "checkpoints" / "tiny", ddpm_state()
    assert "tiny" in run("prepare", "checkpoint=list")[1]
    code, text = run("sample", "checkpoint=tiny", "num_samples=1", "callbacks=none")
    assert code == 2
    assert (
        "checkpoint tiny is not here: `steadyflow prepare checkpoint=tiny` fetches it; without a connection, put"
        in text
    )
    assert f"put {server.url} at {place}/source/weights.pt" in text
    code, text = run("prepare", "checkpoint=tiny", "info=true")
    assert (code, server.ranges) == (0, [])
    assert "MIT" in text

    server.breaks = [1000]
    code, text = run("prepare", "checkpoint=tiny")
    assert code == 2
    assert f"truncated download of {server.url}: 1000 of {len(server.data)} bytes are here" in text
    code, text = run("prepare", "checkpoint=tiny", f"export={tmp_path}/mine")
    assert code == 0
    assert server.ranges == [None, "bytes=1000-"]
    assert f"{sum(v.numel() for v in state.values()):,}" in text  # parameters
    assert f"{flops_by_hand():,}" in text
    assert re.search(r"source\W+nobody", text)
    for found in (
        load(tmp_path / "mine"),
        load(place),
        load(place / "source" / "weights.pt", format="ddpm", arguments={"image_size": 8}),
    ):
        assert torch.equal(found.denoiser.network.get_parameter("stem.weight"), state["conv_in.weight"])
    (place / "source" / "weights.pt").unlink()
    assert run("sample", "checkpoint=tiny", "num_samples=1", "callbacks=none", "sampler.steps=1")[1].count(
        "makes samples of"
    )


def test_a_file_fetched_by_hand_may_have_any_name_where_it_lies_alone(tmp_path: Path) -> None:
    named = {"file": "one.pth", "format": "ddpm", "arguments": {"image_size": 8}}
    source = Public("hand", str(tmp_path), None, "https://page", None, **named)  # type: ignore[arg-type]
    there = tmp_path / "hand" / "source"
    refusal = rf"hand has to be fetched by hand from https://page: put one.pth into {there}, under any name, alone"
    with pytest.raises(FileNotFoundError, match=refusal):
        source.prepare()
    there.mkdir(parents=True)
    (there / "one (1).pth").write_bytes(saved(ddpm_state()))
    (there / "other.pth").touch()
    with pytest.raises(FileNotFoundError, match=refusal):
        source.prepare()
    (there / "other.pth").rename(there / "other.crdownload")
    source.prepare()
    assert source.converted()
    assert not source.missing()


def flops_by_hand(w: int = 32, n: int = 64) -> int:
    """Two a multiply-add: convolutions (3 x 3 in five blocks, two of them on 2 w channels), matrices, attention."""
    convolutions = 9 * n * (3 * w + 3 * w + (3 * 2 + 2 * 3) * w * w) + 2 * n * 2 * w * w
    attention = n * 4 * w * w + 2 * n * n * w
    time = w * 4 * w + 16 * w * w + 5 * 4 * w * w
    return 2 * (convolutions + attention + time)


def test_flops_of_an_equilibrium_are_those_of_its_iterations() -> None:
    def count(iterations: int) -> int:
        network = GET(3, 8, width=64, depth=1, equilibrium_depth=1, iterations=iterations)
        return flops(network, SimpleNamespace(path=ConditionalOT(), shape=(3, 8, 8), num_classes=0))  # type: ignore[arg-type]

    w, n = 64, 16
    step = 2 * (n * (4 + 2 * 8) * w * w + 2 * n * n * w)  # q, k, v, out, the wide layers, attention
    assert (count(2) - count(1), count(3) - count(2)) == (step, step)


def test_bad_files_are_one_line_and_exit_code_2(run: Any, server: Server, tmp_path: Path) -> None:
    source = tmp_path / "checkpoints" / "tiny" / "source" / "weights.pt"
    source.parent.mkdir(parents=True)

    def refused(expected: str, *overrides: str) -> None:
        code, text = run("prepare", *(overrides or ("checkpoint=tiny",)))
        assert (code, text.count("\n")) == (2, 1)
        assert re.search(expected, text), text

    state = ddpm_state()
    source.write_bytes(saved({k: v for k, v in state.items() if k != "mid.block_1.norm2.weight"}))
    refused(
        r"weights\.pt: 1 weights are missing, first middle\.0\.block\.norm2\.weight; did you mean middle\.\d\.block"
    )
    source.write_bytes(b"<!DOCTYPE html><title>Sign in</title>")
    refused(r"weights\.pt: this is a web page, not the weights")
    source.write_bytes(server.data)
    wrong = ("checkpoint=tiny", "checkpoint.arguments.image_size=16")
    refused("has resolution 16; checkpoint tiny has 8", *wrong)
    assert [it.name for it in source.parent.iterdir()] == ["weights.pt"]  # no hash is kept of what was refused
    assert run("prepare", "checkpoint=tiny")[0] == 0
    source.write_bytes(server.data[:-1])  # from here on it is
    refused(r"weights\.pt is not what it should be: \S+/weights\.pt\.sha256 .* says sha256 \w+, found \w+", *wrong)
    source.write_bytes(server.data)
    file = ("checkpoint=path", f"checkpoint.file={source}")
    refused("a file of another project's; say of which format: it looks like format=ddpm", *file)
    refused(
        "is no U-Net of guided-diffusion: it has no weight .*; it looks like format=ddpm",
        *file,
        "checkpoint.format=adm",
        "+checkpoint.arguments.image_size=8",
    )
    refused(r"no format 'ddmp': there are adm, .*; did you mean ddpm\?", *file, "checkpoint.format=ddmp")
    refused("format ddpm needs the arguments image_size", *file, "checkpoint.format=ddpm")
    refused(
        r"takes no argument 'image_siz'; did you mean image_size\?",
        *file,
        "checkpoint.format=ddpm",
        "+checkpoint.arguments.image_siz=8",
    )
    source.write_bytes(server.data[:-2000])
    refused(
        r"weights\.pt(:| is) truncated or damaged",
        *file,
        "checkpoint.format=ddpm",
        "+checkpoint.arguments.image_size=8",
    )
    source.write_bytes(server.data)
    code, text = run("sample", *file, "checkpoint.format=ddpm", "+checkpoint.arguments.image_size=8", "num_samples=1")
    assert code == 2
    assert "makes samples of shape (3, 8, 8), but dataset digits has (1, 32, 32)" in text
