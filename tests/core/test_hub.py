"""A hub id becomes a snapshot without a pickle file, asked of a stand-in Hub on the loopback; failures have hints."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from lorakit.core.errors import ArtifactDamaged, DiskFailed, HubFailed, InputRefused, UsageError
from lorakit.core.events import Notice
from lorakit.core.hub import DATA_KINDS, PACKINGS, dataset_snapshot, model_folder, push_folder
from tests.conftest import Ran

COMMIT = "0123456789abcdef0123456789abcdef01234567"

FILES: Mapping[str, bytes] = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "pytorch_model.bin": b"pickle",
    "training_args.pt": b"pickle",
    "modeling_evil.py": b"raise SystemExit(1)",
    "README.md": b"# A model",
}
WANTED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


class Hub(ThreadingHTTPServer):
    """As much of the Hub as a snapshot asks for; `failure` is a status and headers that every request gets instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[str] = []
        self.failure: tuple[int, Mapping[str, str]] | None = None
        self.datasets: dict[tuple[str, str], tuple[str, Mapping[str, bytes]]] = {}
        """(name, revision) → commit and files."""
        self.repositories: dict[str, dict[str, Any]] = {}
        """What was asked for of each repository that was made, by its name."""
        self.uploaded: dict[str, dict[str, bytes]] = {}
        """The files of each repository that was uploaded to."""
        self.objects: dict[str, bytes] = {}
        """Large files by their sha256, as Git LFS uploads them."""
        self.upload_failure: tuple[str, int] | None = None
        """The end of a path, and the status that a request for it gets instead of an answer."""

    @property
    def downloaded(self) -> set[str]:
        return {path.partition(f"/resolve/{COMMIT}/")[2] for path in self.asked if "/resolve/" in path}


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        if self.server.failure is not None:
            status, headers = self.server.failure
            return self.answer(b"{}", status, **headers)
        if path == "/api/models/owner/tiny/revision/main":
            info = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            return self.answer(json.dumps(info).encode())
        if path == f"/api/models/owner/tiny/tree/{COMMIT}":
            listed = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in FILES.items()]
            return self.answer(json.dumps(listed).encode())
        if path.startswith(("/api/datasets/", "/datasets/")):
            return self.answer_dataset(path)
        name = path.removeprefix(f"/owner/tiny/resolve/{COMMIT}/")
        if name in FILES:
            return self.answer(FILES[name], ETag=f'"{etag(FILES[name])}"')
        return self.answer(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fails(path):
            return None
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, asked)
            url = f"http://127.0.0.1:{self.server.server_port}/{name}"
            return self.answer(json.dumps({"url": url, "id": name}).encode(), 409 if known else 200)
        if path == "/api/validate-yaml":
            return self.answer(b"{}")
        if path.endswith("/preupload/main"):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.answer(json.dumps({"files": [{**mode, "shouldIgnore": False} for mode in modes]}).encode())
        if path.endswith(".git/info/lfs/objects/batch"):
            place = f"http://127.0.0.1:{self.server.server_port}/lfs/"
            objects = [
                {**asked, "actions": {"upload": {"href": place + asked["oid"]}}}
                for asked in json.loads(body)["objects"]
            ]
            return self.answer(json.dumps({"transfer": "basic", "objects": objects}).encode())
        if path.startswith("/api/models/") and path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            files = self.server.uploaded.setdefault(name, {})
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    files[line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
            found = {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}",
            }
            return self.answer(json.dumps(found).encode())
        return self.answer(b"{}", 404)

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.fails(path):
            self.server.objects[hashlib.sha256(body).hexdigest()] = body
            self.answer(b"")

    def fails(self, path: str) -> bool:
        failure = self.server.upload_failure
        if failure is None or failure[0] not in path:
            return False
        self.answer(b"{}", failure[1])
        return True

    def answer_dataset(self, path: str) -> None:
        for (name, revision), (commit, files) in self.server.datasets.items():
            if path in (f"/api/datasets/{name}/revision/{quote(key, safe='')}" for key in (revision, commit)):
                info = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
                return self.answer(json.dumps(info).encode())
            if path == f"/api/datasets/{name}/tree/{commit}":
                listed = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in files.items()]
                return self.answer(json.dumps(listed).encode())
            file = unquote(path).removeprefix(f"/datasets/{name}/resolve/{commit}/")
            if file in files:
                return self.answer(files[file], **{"ETag": f'"{etag(files[file])}"', "X-Repo-Commit": commit})
        known = any(path.startswith(f"/api/datasets/{name}/") for name, _ in self.server.datasets)
        self.answer(b"{}", 404, **{"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def point_at(address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads its environment when it is imported, so what it has read is replaced."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol has no stand-in here: plain Git LFS
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        point_at(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
        yield server
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


def refused(name: str = "owner/tiny") -> HubFailed:
    with pytest.raises(HubFailed) as caught:
        model_folder(name, timeout_seconds=2.0)
    assert caught.value.exit_code == 12
    assert caught.value.message.startswith(f"{name}: found ")
    return caught.value


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    assert model_folder("owner/tiny") == Path("owner/tiny")
    assert model_folder(str(tmp_path / "owner")) == tmp_path / "owner"


def test_a_hub_id_becomes_a_folder_with_its_files(hub: Hub) -> None:
    folder = model_folder("owner/tiny")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: FILES[name] for name in WANTED}


def test_no_file_is_asked_for_that_could_run_code(hub: Hub) -> None:
    model_folder("owner/tiny")
    assert hub.downloaded == WANTED


def test_a_snapshot_is_downloaded_once_and_found_again_without_the_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model_folder("owner/tiny")
    hub.asked.clear()
    assert model_folder("owner/tiny") == first
    assert hub.downloaded == set()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    hub.asked.clear()
    assert model_folder("owner/tiny") == first
    assert hub.asked == []


@pytest.mark.parametrize("status", [401, 404])
def test_a_name_that_the_hub_doesnt_know_is_told_with_what_to_check(hub: Hub, status: int) -> None:
    hub.failure = status, {"X-Error-Code": "RepoNotFound"}
    error = refused()
    assert "neither a local folder nor a model on the Hub" in error.message
    assert "spelling" in error.hint
    assert "HF_TOKEN" in error.hint


def test_a_token_that_the_hub_refuses_is_told_as_that(hub: Hub) -> None:
    hub.failure = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
    error = refused()
    assert "401" in error.message
    assert "hf auth login" in error.hint


def test_a_gated_model_is_told_with_how_to_get_access(hub: Hub) -> None:
    hub.failure = 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model owner/tiny is restricted"}
    error = refused()
    assert "gated" in error.message
    assert "accept its terms at huggingface.co/owner/tiny" in error.hint


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_a_hub_that_fails_is_told_with_its_reason(hub: Hub, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.failure = status, {}
    error = refused()
    assert str(status) in error.message
    assert "network" in error.hint


def test_a_hub_that_isnt_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as server:
        address = f"http://127.0.0.1:{server.server_port}"
    point_at(address, tmp_path, monkeypatch)
    error = refused()
    assert "Hub" in error.message
    assert "or give a folder" in error.hint


def test_without_a_network_nothing_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    refused()
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["./model", "../model", "/no/such/model", "a/b/c", "owner/", "", "my model", "-r", "~/model", "x\0y"]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_asking(name: str, hub: Hub) -> None:
    with pytest.raises(InputRefused, match="found no such folder, need a model folder or a hub id") as caught:
        model_folder(name)
    assert caught.value.exit_code == 3
    assert hub.asked == []


def test_a_file_is_no_model_folder(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(InputRefused, match="found a file, need a model folder"):
        model_folder("model")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["x" * 5000, "a--b", "owner/name.git"])
def test_a_name_that_no_model_can_have_is_refused_without_asking(name: str, hub: Hub) -> None:
    with pytest.raises((InputRefused, HubFailed)) as caught:
        model_folder(name)
    assert caught.value.message.startswith(f"{name}: found ")
    assert hub.asked == []


def test_a_cache_that_cant_be_written_is_a_disk_failure(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(DiskFailed) as caught:
        model_folder("owner/tiny")
    assert caught.value.exit_code == 7


def test_the_stand_in_is_what_was_asked(hub: Hub) -> None:
    """Were the real Hub asked, the tests above would prove nothing."""
    model_folder("owner/tiny")
    asked: Any = {path.partition("/resolve/")[0] for path in hub.asked}
    assert asked == {"/api/models/owner/tiny/revision/main", f"/api/models/owner/tiny/tree/{COMMIT}", "/owner/tiny"}


# Datasets

DATASET: Mapping[str, bytes] = {
    "README.md": b"# Rows",
    "rows.py": b"raise SystemExit(1)",
    "data/train.jsonl": b'{"text": "a"}\n',
    "data/train.csv.gz": b"no gzip, which nobody looks at here",
    "data/loader.py": b"raise SystemExit(1)",
    "model.bin": b"pickle",
    "picture.png": b"picture",
}
DATASET_WANTED = {"README.md", "data/train.jsonl", "data/train.csv.gz"}
OTHER_COMMIT = "f" * 40


@pytest.fixture
def dataset_hub(hub: Hub) -> Hub:
    hub.datasets = {
        ("owner/rows", "main"): (COMMIT, DATASET),
        ("owner/rows", "v2"): (OTHER_COMMIT, {"only.txt": b"another"}),
        ("bare", "main"): (COMMIT, {"rows.jsonl": b"{}"}),
    }
    return hub


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dataset_refused(name: str = "owner/rows", revision: str | None = None) -> HubFailed:
    with pytest.raises(HubFailed) as caught:
        dataset_snapshot(name, revision, 2.0)
    assert caught.value.message.startswith(f"{name}: found ")
    return caught.value


def test_a_dataset_becomes_a_folder_of_its_data_and_its_commit(dataset_hub: Hub) -> None:
    folder, commit = dataset_snapshot("owner/rows", None, 2.0)
    assert commit == COMMIT
    assert content(folder) == {name: DATASET[name] for name in DATASET_WANTED}
    assert dataset_hub.downloaded == DATASET_WANTED


def test_a_dataset_without_an_owner_is_one(dataset_hub: Hub) -> None:
    folder, _ = dataset_snapshot("bare", None, 2.0)
    assert content(folder) == {"rows.jsonl": b"{}"}


def test_the_commit_of_a_dataset_is_asked_once(dataset_hub: Hub) -> None:
    dataset_snapshot("owner/rows", None, 2.0)
    assert [path for path in dataset_hub.asked if "/revision/" in path] == ["/api/datasets/owner/rows/revision/main"]


@pytest.mark.parametrize("revision", ["v2", OTHER_COMMIT])
def test_a_revision_of_a_dataset_is_its_own_snapshot(revision: str, dataset_hub: Hub) -> None:
    folder, commit = dataset_snapshot("owner/rows", revision, 2.0)
    assert commit == OTHER_COMMIT
    assert content(folder) == {"only.txt": b"another"}


def test_a_revision_that_isnt_there_is_told(dataset_hub: Hub) -> None:
    error = dataset_refused(revision="v3")
    assert "no revision v3 of this dataset" in error.message
    assert "huggingface.co/datasets/owner/rows" in error.hint


def test_a_dataset_is_found_again_without_the_network(dataset_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataset_snapshot("owner/rows", None, 2.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    dataset_hub.asked.clear()
    assert dataset_snapshot("owner/rows", None, 2.0) == first
    assert dataset_hub.asked == []
    dataset_refused("owner/other")


def test_a_dataset_that_the_hub_doesnt_know_is_told(dataset_hub: Hub) -> None:
    error = dataset_refused("owner/other")
    assert "neither a local folder nor a dataset on the Hub" in error.message


def test_a_gated_dataset_is_told_with_its_own_page(dataset_hub: Hub) -> None:
    dataset_hub.failure = 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}
    error = dataset_refused()
    assert "gated dataset" in error.message
    assert "huggingface.co/datasets/owner/rows" in error.hint


@pytest.mark.parametrize("name", ["./rows", "/no/rows", "a/b/c", "owner/", "", "~/rows", "-r", "x\0y", "x" * 5000])
def test_what_no_dataset_can_be_called_is_refused_without_asking(name: str, hub: Hub) -> None:
    with pytest.raises(InputRefused, match="found no such file or folder"):
        dataset_snapshot(name, None)
    assert hub.asked == []


@pytest.mark.parametrize("suffix", DATA_KINDS)
@pytest.mark.parametrize("packing", ["", *PACKINGS])
def test_every_kind_of_data_is_downloaded(suffix: str, packing: str, hub: Hub) -> None:
    name = f"a folder/rows{suffix}{packing}"
    hub.datasets = {("owner/rows", "main"): (COMMIT, {name: b"x"})}
    folder, _ = dataset_snapshot("owner/rows", None, 2.0)
    assert content(folder) == {name: b"x"}


# Uploads


def a_model(folder: Path) -> dict[str, bytes]:
    """A folder with what goes to the Hub, which is returned, and what doesn't."""
    files = {"config.json": b"{}", "README.md": b"# mine", "model.safetensors": b"\x02\0\0\0\0\0\0\0{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name in ("lorakit.json", "lorakit.yaml", ".hidden"):
        (folder / name).write_text("stays here")
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"stays here")
    return files


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_becomes_a_repository(hub: Hub, tmp_path: Path, private: bool) -> None:
    (tmp_path / "model").mkdir()
    files = a_model(tmp_path / "model")
    told: list[Any] = []
    address = push_folder(tmp_path / "model", "owner/mine", private=private, report=told.append)
    assert address == f"{constants.ENDPOINT}/owner/mine"
    assert hub.uploaded == {"owner/mine": files}
    made = hub.repositories["owner/mine"]
    assert (made.get("private") is True or made.get("visibility") == "private") == private
    assert [event.text for event in told if isinstance(event, Notice)] == [
        f"uploading {tmp_path / 'model'} to owner/mine"
    ]


def test_a_second_upload_goes_to_the_same_repository(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    files = a_model(tmp_path / "model")
    push_folder(tmp_path / "model", "owner/mine", private=False, report=lambda event: None)
    (tmp_path / "model" / "README.md").write_bytes(b"# better")
    push_folder(tmp_path / "model", "owner/mine", private=False, report=lambda event: None)
    assert hub.uploaded == {"owner/mine": {**files, "README.md": b"# better"}}


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/repos/create", 401, "doesn't let you write"),
        ("/api/repos/create", 403, "doesn't let you write"),
        ("/preupload/", 500, "upload failed"),
        ("/lfs/objects/batch", 403, "doesn't let you write"),
        ("/lfs/", 500, "upload failed"),
        ("/commit/main", 503, "upload failed"),
    ],
)
def test_an_upload_that_fails_is_told_and_the_folder_is_kept(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, status: int, words: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "model").mkdir()
    files = a_model(tmp_path / "model")
    hub.upload_failure = path, status
    with pytest.raises(HubFailed) as caught:
        push_folder(tmp_path / "model", "owner/mine", private=False, report=lambda event: None)
    assert words in caught.value.message
    assert str(status) in caught.value.message
    assert "the same command goes on" in caught.value.hint
    assert hub.uploaded == {}
    assert {name: (tmp_path / "model" / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("name", ["a/b/c", "../up", "owner/", "owner/x y", "x" * 97])
def test_a_name_that_is_no_repository_is_refused_before_anything_is_asked(hub: Hub, name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="need owner/name"):
        push_folder(tmp_path, name, private=False, report=lambda event: None)
    assert hub.asked == []


def test_a_merged_model_is_uploaded_once_it_is_verified(
    hub: Hub, cli: Callable[..., Ran], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.core import merging
    from tests.core.merging.adapted import make_adapter

    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    line = ("merge", adapter, "--output", tmp_path / "merged", "--push-to-hub", "owner/mine", "--private", "--json")
    right = merging.verify_rows

    def wrong(*_: object) -> float:
        raise ArtifactDamaged("found other numbers, need these", "look")

    monkeypatch.setattr(merging, "verify_rows", wrong)
    assert cli(*line).code == 4
    assert hub.uploaded == {}
    monkeypatch.setattr(merging, "verify_rows", right)
    hub.upload_failure = "/commit/main", 403
    assert cli(*line).code == 12
    hub.upload_failure = None
    ran = cli(*line)
    assert ran.code == 0, ran.err
    assert (ran.json["already_done"], ran.json["url"]) == (True, f"{constants.ENDPOINT}/owner/mine")
    there = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    kept = ("lorakit.json", "lorakit.yaml")
    assert hub.uploaded == {"owner/mine": {name: there[name] for name in there if name not in kept}}
