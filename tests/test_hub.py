"""Hub ids, downloaded over HTTP from a local endpoint in a fresh process."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest
import torch

from vgen.hub import extend_diffusers
from vgen.models.unet import UNet3D
from vgen.pipeline import VideoGenPipeline

from .models.test_unet import TINY
from .test_pipeline import make_pipeline

REPO, WAN, COMMIT = "someone/something", "someone/wan", "0" * 40


def make_unet():
    torch.manual_seed(0)
    return UNet3D(**TINY, temporal_head_dim=8)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory, wan_folder):
    """A server with two repositories: a tiny pipeline, its weights also as a variant, and a WanPipeline."""
    folder = tmp_path_factory.mktemp("repository")
    make_pipeline().save_pretrained(folder)
    make_pipeline(seed=1).save_pretrained(folder, variant="fp16")
    make_unet().save_pretrained(folder / "unet")
    folders = {REPO: folder, WAN: wan_folder}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):  # noqa: N802
            self.answer(body=False)

        def do_GET(self):  # noqa: N802
            self.answer(body=True)

        def answer(self, body):
            path, headers = self.path.split("?")[0].strip("/"), {}
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            folder = folders.get(repo)
            files = [] if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
            names = [str(path.relative_to(folder)) for path in files]
            if names and path.startswith(f"api/models/{repo}/tree/"):
                sizes = [path.stat().st_size for path in files]
                tree = [
                    {"type": "file", "path": name, "size": size, "oid": COMMIT}
                    for name, size in zip(names, sizes, strict=True)
                ]
                content, status = json.dumps(tree).encode(), 200
            elif names and path.startswith(f"api/models/{repo}"):
                siblings = [{"rfilename": name} for name in names]
                info = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                content, status = json.dumps(info).encode(), 200
            elif names and path.startswith(f"{repo}/resolve/") and path.split("/", 4)[4] in names:
                content, status = (folder / path.split("/", 4)[4]).read_bytes(), 200
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            else:
                content, status = b"", 404
                headers["X-Error-Code"] = "EntryNotFound" if names else "RepoNotFound"
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(content), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def total(network):
    return sum(weight.double().sum().item() for weight in network.parameters())


RUN = """
import json, sys, traceback
results = {}
for name, code in json.loads(sys.argv[1]).items():
    scope = {}
    try:
        exec(code, scope)
        results[name] = sum(weight.double().sum().item() for weight in scope["p"].parameters())
    except Exception:
        results[name] = traceback.format_exc()
print(json.dumps(results))
"""


def fresh(codes, endpoint, cache, **variables):
    """Runs each code in one new process: the sum of the weights of its `p`, or its error."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"} | variables
    command = [sys.executable, "-c", RUN, json.dumps(codes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LOADS = {
    "diffusers": "import sys, vgen; assert 'diffusers' not in sys.modules; "
    "from diffusers import DiffusionPipeline as C; assert 'vgen.pipeline' not in sys.modules; "
    f"p = C.from_pretrained({REPO!r}).vae",
    "AutoModel": f"from diffusers import AutoModel as C; p = C.from_pretrained({REPO!r}, subfolder='transformer')",
    "pipeline": f"from vgen import VideoGenPipeline as C; p = C.from_pretrained({REPO!r}).transformer",
    "transformer": "from vgen import SpacetimeTransformer as C; "
    f"p = C.from_pretrained({REPO!r}, subfolder='transformer')",
    "vae": f"from vgen import CausalVideoVAE as C; p = C.from_pretrained({REPO!r}, subfolder='vae', variant='fp16')",
    "the VAE of a pipeline": f"from vgen.models.image_vae import load_vae; p = load_vae({REPO!r})",
    "WanPipeline": f"from vgen import VideoGenPipeline as C; p = C.from_pretrained({WAN!r}).transformer",
    "unet": f"from vgen import UNet3D as C; p = C.from_pretrained({REPO!r}, subfolder='unet')",
}

MISSING = {
    "repository": "from vgen import VideoGenPipeline as C; C.from_pretrained('someone/else')",
    "variant": f"from vgen import CausalVideoVAE as C; C.from_pretrained({REPO!r}, subfolder='vae', variant='bf16')",
}


@pytest.mark.parametrize("is_lazy", [True, False])
def test_diffusers_gets_the_classes_if_it_was_imported_first(monkeypatch, is_lazy):
    module = ModuleType("diffusers")
    if is_lazy:
        module._objects = {"Their": 1}
        module.__getattr__ = lambda name: module._objects[name]
    monkeypatch.setitem(sys.modules, "diffusers", module)
    loading = ModuleType("diffusers.pipelines.pipeline_loading_utils")
    loading.LOADABLE_CLASSES = {}
    monkeypatch.setitem(sys.modules, loading.__name__, loading)
    extend_diffusers({"UNet3D": "vgen.models.unet"})
    assert loading.LOADABLE_CLASSES == {"vgen.models.unet": {"UNet3D": ["save_pretrained", "from_pretrained"]}}
    assert module.UNet3D is UNet3D and (not is_lazy or module.Their == 1)


@pytest.mark.slow
def test_hub_ids_are_downloaded_and_loaded_and_missing_ones_are_named(endpoint, wan_folder, tmp_path):
    """In one new process with the server and one without: to import everything takes most of the time."""
    pipe, other = make_pipeline(), make_pipeline(seed=1)
    networks = {
        "pipeline": pipe.transformer, "diffusers": pipe.vae, "AutoModel": pipe.transformer,
        "transformer": pipe.transformer, "vae": other.vae,
        "the VAE of a pipeline": pipe.vae, "WanPipeline": VideoGenPipeline.from_pretrained(wan_folder).transformer,
        "unet": make_unet(),
    }  # fmt: skip
    assert networks.keys() == LOADS.keys()
    expected = {name: total(network) for name, network in networks.items()}
    results = fresh(LOADS | MISSING, endpoint, tmp_path)
    assert "ValueError: no model 'someone/else'" in results.pop("repository")
    assert "bf16" in results.pop("variant")
    assert results == expected
    # what is downloaded loads without the server
    assert fresh(LOADS, "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1") == expected
