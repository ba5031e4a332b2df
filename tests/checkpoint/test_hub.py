"""Names of the Hugging Face Hub: from a cache in its real layout, from a server on this machine, or refused."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.adapters import applied, factors, write_adapter
from tests.helpers.checkpoints import (
    Done,
    fine_tuned,
    llama,
    llama_config,
    load_output,
    pymerge,
    tree,
    write_model,
    write_models,
)
from tests.helpers.sentences import write_sentences

COMMIT, NEWER = "a" * 40, "b" * 40
CONFIG = """\
merge_method: linear
base_model: org/base
models:
  - model: org/base
  - model: org/e0@{revision}
parameters: {{weight: 1}}
"""


def put_in_cache(cache: Path, name: str, model: Path, commit: str, *refs: str) -> Path:
    """Store a model's files as huggingface_hub does: blobs by digest, links in a snapshot, a ref for each branch."""
    home = cache / f"models--{name.replace('/', '--')}"
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        data = file.read_bytes()
        blob = home / "blobs" / hashlib.sha256(data).hexdigest()
        link = home / "snapshots" / commit / file.relative_to(model)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(Path(*[".."] * (2 + len(file.relative_to(model).parents) - 1), "blobs", blob.name))
    for ref in refs:
        (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return home / "snapshots" / commit


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """local/base and local/e0, and merge.yml that names them by their names on the Hub."""
    base = llama()
    files = {"tokenizer.json": "{}", "modeling_x.py": "raise SystemExit", "1_Pooling/config.json": "{}"}
    write_models(tmp_path / "local", base, experts=1, config=llama_config(base), files=files)
    write_config(tmp_path, "main")
    return tmp_path


def write_config(folder: Path, revision: str) -> None:
    (folder / "merge.yml").write_text(CONFIG.format(revision=revision))


def run(models: Path, command: str = "merge", *, out: str = "out", **variables: str) -> Done:
    env = {"HF_HUB_CACHE": str(models / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"} | variables
    arguments = [models / out] if command == "merge" else []
    return pymerge(command, models / "merge.yml", *arguments, env=env)


def test_a_cached_model_is_merged_offline(models: Path) -> None:
    cache = models / "cache"
    put_in_cache(cache, "org/base", models / "local/base", COMMIT, "main")
    folder = put_in_cache(cache, "org/e0", models / "local/e0", NEWER, "main", "refs/pr/1")
    done = run(models, HF_HUB_OFFLINE="1")
    assert done.code == 0, done
    base, expert = (load_output(models / "local" / name) for name in ("base", "e0"))
    found = load_output(models / "out")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (base[name] + expert[name]) / 2)
    assert (models / "out/tokenizer.json").read_text() == "{}"
    assert (models / "out/1_Pooling/config.json").is_file()
    assert (models / "out/modeling_x.py").read_text() == "raise SystemExit"
    card = (models / "out/README.md").read_text()
    assert f"From the Hugging Face Hub: `org/base@{COMMIT}`, `org/e0@{NEWER}`." in card
    assert not (models / "out/model.safetensors").is_symlink()
    for revision in ("refs/pr/1", NEWER):
        write_config(models, revision)
        done = run(models, "plan", HF_HUB_OFFLINE="1")
        assert done.code == 0, done
        assert str(folder) in done.out
    # HF_HOME holds the cache under hub/.
    (models / "home").mkdir()
    cache.rename(models / "home/hub")
    assert pymerge("plan", models / "merge.yml", env={"HF_HOME": str(models / "home"), "HF_HUB_OFFLINE": "1"}).code == 0


def test_another_commit_is_another_merge(models: Path) -> None:
    put_in_cache(models / "cache", "org/base", models / "local/base", COMMIT, "main")
    put_in_cache(models / "cache", "org/e0", models / "local/e0", COMMIT, "main")
    assert run(models, HF_HUB_OFFLINE="1").code == 0
    assert "holds this very merge already" in run(models, HF_HUB_OFFLINE="1").out
    put_in_cache(models / "cache", "org/e0", models / "local/e0", NEWER, "main")
    done = run(models, HF_HUB_OFFLINE="1")
    assert done.code == 8, done


def test_what_is_not_cached_is_named_with_a_remedy(models: Path) -> None:
    put_in_cache(models / "cache", "org/base", models / "local/base", COMMIT, "main")
    (models / "local/e0/model.safetensors").unlink()
    put_in_cache(models / "cache", "org/e0", models / "local/e0", COMMIT, "main")
    done = run(models, HF_HUB_OFFLINE="1")
    assert done.code == 4, done
    assert "org/e0@main: its weights are not all in the cache" in done.errors[0]
    assert "HF_HUB_OFFLINE is set; unset it" in done.errors[0]
    write_config(models, "v2")
    done = run(models, HF_HUB_OFFLINE="1")
    assert f"org/e0@v2: is no folder here and not in the cache {models / 'cache'}, and HF_HUB_OFFLINE" in done.errors[0]
    assert "or run `hf download org/e0`" in done.errors[0]
    (models / "merge.yml").write_text(CONFIG.format(revision="main").replace("org/", "none/"))
    done = run(models, HF_HUB_OFFLINE="1")
    assert all(f"none/{name}: is no folder here" in done.errors[0] for name in ("base", "e0@main"))
    assert not (models / "out").exists()


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(models: Path) -> None:
    (models / "merge.yml").write_text(CONFIG.format(revision="main").replace("org/", "local/").replace("@main", "x"))
    done = run(models)
    assert done.code == 4
    assert "model 'local/e0x' not found: no " in done.errors[0]


class Hub:
    """A server of one model per name, as much of huggingface.co as a download asks for."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.partition("?")[0].strip("/")
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        model = self.models.get(name)
        if "gated" in name or model is None:
            code = "GatedRepo" if "gated" in name else "RepoNotFound"
            self._send(request, 403 if model is None and "gated" in name else 404, b"", {"X-Error-Code": code})
        elif path.startswith("api/models/"):
            files = sorted(file for file in model.rglob("*") if file.is_file())
            listing = [
                {"type": "file", "path": str(file.relative_to(model)), "size": file.stat().st_size, "oid": "0" * 40}
                for file in files
            ]
            revision = path.split("/revision/")[-1] if "/revision/" in path else "main"
            if revision not in ("main", COMMIT):
                self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": item["path"]} for item in listing]}
            self._send(request, 200, json.dumps(listing if "/tree/" in path else info).encode())
        else:
            file = model / path.split("/resolve/")[1].partition("/")[2]
            data = file.read_bytes()
            if body:
                self.fetched.append(f"{name}/{file.relative_to(model)}")
            etag = hashlib.sha256(data).hexdigest()
            self._send(request, 200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, body=body)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        body: bool = True,
    ) -> None:
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)


@pytest.fixture
def hub(models: Path) -> Iterator[Hub]:
    base = llama()
    sharded = write_model(models / "sharded", base, shards=2, config=llama_config(base))
    torch.save(base, sharded / "pytorch_model.bin")
    torch.save(base, sharded / "consolidated.pt")
    (sharded / "onnx").mkdir()
    (sharded / "onnx/config.json").write_text("{}")
    bare = models / "bare"
    bare.mkdir()
    torch.save(fine_tuned(base, 0), bare / "pytorch_model.bin")
    torch.save(fine_tuned(base, 0), bare / "optimizer.pt")
    of_gguf = models / "of_gguf"
    of_gguf.mkdir()
    (of_gguf / "x-Q4_0.gguf").write_bytes(b"GGUF")
    served = Hub({"org/base": sharded, "org/e0": bare, "org/e0-GGUF": of_gguf})
    yield served
    served.server.shutdown()


def test_a_download_takes_what_a_merge_needs_and_no_more(models: Path, hub: Hub) -> None:
    done = run(models, HF_ENDPOINT=hub.address)
    assert done.code == 0, done
    assert sorted(hub.fetched) == [
        "org/base/config.json",
        "org/base/model-00001-of-00002.safetensors",
        "org/base/model-00002-of-00002.safetensors",
        "org/base/model.safetensors.index.json",
        "org/e0/pytorch_model.bin",
    ]
    assert f"`org/base@{COMMIT}`" in (models / "out/README.md").read_text()
    expected = {name: (tensor + fine_tuned(llama(), 0)[name]) / 2 for name, tensor in llama().items()}
    found = load_output(models / "out")
    assert all(torch.allclose(found[name], tensor) for name, tensor in expected.items())
    # Once cached, neither the server nor a network is needed.
    hub.fetched.clear()
    before = tree(models / "out")
    assert run(models, HF_HUB_OFFLINE="1").code == 0
    assert tree(models / "out") == before
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/gated", "is gated; accept its terms at {address}/org/gated and run `hf auth login`"),
        ("org/none", "is no folder here and no model of the Hub that may be read"),
        ("org/e0@v7", "the model has no such revision"),
        (
            "org/e0-GGUF",
            "has weights in files of GGUF alone, one for each encoding; download one (`hf download org/e0-GGUF",
        ),
    ],
)
def test_what_the_hub_refuses(name: str, said: str, models: Path, hub: Hub) -> None:
    (models / "merge.yml").write_text(CONFIG.format(revision="main").replace("org/e0@main", name))
    done = run(models, HF_ENDPOINT=hub.address)
    assert done.code == 4, done
    assert len(done.errors) == 1
    assert f"{name}: " + said.format(address=hub.address) in done.errors[0]
    assert not (models / "out").exists()


def test_nothing_is_downloaded_while_a_model_on_this_machine_is_wrong(models: Path, hub: Hub) -> None:
    (models / "merge.yml").write_text(CONFIG.format(revision="main").replace("org/e0@main", "local/none"))
    done = run(models, HF_ENDPOINT=hub.address)
    assert done.code == 4, done
    assert "model 'local/none' not found" in done.errors[0]
    assert hub.fetched == []
    assert not (models / "cache").exists()


def test_modules_and_weights_beside_are_downloaded_too(models: Path, hub: Hub) -> None:
    for seed, name in enumerate(("base", "e0")):
        folder = write_sentences(models / f"sentences-{name}", seed)
        for other in ("tf_model.h5", "pytorch_model.bin", "onnx/model.onnx", "2_Dense/pytorch_model.bin"):
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_bytes(b"x")
        torch.save({"weight": torch.ones(2, 2)}, folder / "colbert_linear.pt")
        hub.models[f"org/{name}"] = folder
    assert run(models, HF_ENDPOINT=hub.address).code == 0
    fetched = {name.removeprefix("org/base/") for name in hub.fetched if name.startswith("org/base/")}
    weights = {name for name in fetched if not name.endswith(".json")}
    assert weights == {
        "model.safetensors",
        "2_Dense/model.safetensors",
        "3_Dense/model.safetensors",
        "colbert_linear.pt",
    }
    assert (models / "out/3_Dense/model.safetensors").is_file()
    assert (models / "out/colbert_linear.pt").is_file()
    # A cache without a module's weights is not whole.
    for file in (models / "cache").glob("models--org--e0/snapshots/*/2_Dense/model.safetensors"):
        file.unlink()
    done = run(models, out="again", HF_HUB_OFFLINE="1")
    assert "its weights are not all in the cache" in done.errors[0]


def test_a_stray_file_of_the_hub_is_not_taken_for_the_model(models: Path, hub: Hub) -> None:
    save_file({"x": torch.ones(2)}, hub.models["org/e0"] / "value_adapter.safetensors")
    save_file({"x": torch.ones(2)}, hub.models["org/e0"] / "adapter_model.safetensors")
    done = run(models, HF_ENDPOINT=hub.address)
    assert done.code == 0, done
    assert "org/e0/pytorch_model.bin" in hub.fetched
    assert "org/e0/adapter_model.safetensors" not in hub.fetched


def test_the_file_that_config_json_names_is_downloaded(models: Path, hub: Hub) -> None:
    folder = hub.models["org/e0"]
    save_file(fine_tuned(llama(), 0), folder / "stage2.safetensors")
    (folder / "config.json").write_text('{"transformers_weights": "stage2.safetensors"}')
    done = run(models, HF_ENDPOINT=hub.address)
    assert done.code == 0, done
    assert {name for name in hub.fetched if "e0" in name} == {"org/e0/config.json", "org/e0/stage2.safetensors"}


def test_a_pipeline_of_the_hub_is_refused_before_its_weights_are_fetched(models: Path, hub: Hub) -> None:
    folder = hub.models["org/e0"]
    (folder / "pytorch_model.bin").unlink()
    (folder / "unet").mkdir()
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")
    (folder / "model_index.json").write_text("{}")
    done = run(models, HF_ENDPOINT=hub.address)
    assert done.code == 4, done
    assert "run `hf download org/e0`, and merge its components one by one, by their folders: 'unet'" in done.errors[0]
    assert not any(name.endswith(".bin") and "e0" in name for name in hub.fetched)


@pytest.mark.parametrize("spelling", ["snapshot", "org/base@main", f"org/base@{COMMIT}"])
def test_a_base_of_the_hub_that_is_listed_again_is_no_expert(spelling: str, models: Path) -> None:
    folder = put_in_cache(models / "cache", "org/base", models / "local/base", COMMIT, "main")
    put_in_cache(models / "cache", "org/e0", models / "local/e0", NEWER, "main")
    again = str(folder) if spelling == "snapshot" else spelling
    text = "merge_method: task_arithmetic\nbase_model: {}\nmodels: [{{model: org/e0}}{}]\nparameters: {{weight: 1}}\n"
    (models / "merge.yml").write_text(text.format("org/base", ""))
    assert run(models, out="expected", HF_HUB_OFFLINE="1").code == 0
    for number, base in enumerate(("org/base", again)):
        other = again if base == "org/base" else "org/base"
        (models / "merge.yml").write_text(text.format(base, f", {{model: '{other}'}}"))
        done = run(models, out=f"out{number}", HF_HUB_OFFLINE="1")
        assert done.code == 0, done
        found, expected = load_output(models / f"out{number}"), load_output(models / "expected")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_two_names_that_a_download_shows_to_be_one_model(models: Path, hub: Hub) -> None:
    text = (
        "merge_method: task_arithmetic\nbase_model: org/base\nmodels: [{{model: org/e0}}, {{model: 'org/base@{}'}}]\n"
    )
    (models / "merge.yml").write_text(text.format(COMMIT) + "parameters: {weight: 1}\n")
    done = run(models, HF_ENDPOINT=hub.address)
    assert done.code == 4, done
    assert "are one model" in done.errors[0]
    assert run(models, HF_HUB_OFFLINE="1").code == 0  # as the message says: known now


def test_an_adapter_of_the_hub(models: Path, hub: Hub) -> None:
    base = llama()
    found = factors(base, ["model.layers.0.self_attn.q_proj"])
    hub.models["org/lora"] = write_adapter(models / "lora", found, base_model_name_or_path="org/base")
    (models / "lora/optimizer.pt").write_bytes(b"x")
    text = "merge_method: task_arithmetic\nbase_model: org/base\nmodels: [{model: NAME, parameters: {weight: 1}}]\n"
    (models / "merge.yml").write_text(text.replace("NAME", "org/base+org/lora@main"))
    done = run(models, HF_ENDPOINT=hub.address)
    assert done.code == 0, done
    assert "warning" not in done.out + done.err
    fetched = [name for name in hub.fetched if "lora" in name]
    assert fetched == ["org/lora/adapter_config.json", "org/lora/adapter_model.safetensors"]
    expected = applied(base, found, 2.0)
    for name, tensor in load_output(models / "out").items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)
    assert f"`org/lora@{COMMIT}`" in (models / "out/README.md").read_text()
    # From the cache, offline, and alone: its base is the merge's.
    hub.fetched.clear()
    (models / "merge.yml").write_text(text.replace("NAME", "org/lora"))
    done = run(models, out="again", HF_HUB_OFFLINE="1")
    assert done.code == 0, done
    assert hub.fetched == []
    one, two = load_output(models / "out"), load_output(models / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)
