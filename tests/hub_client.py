"""The real Hub clients (huggingface_hub, transformers, ours) against a `Hub` of hub_server: in a process of their own, or redirected in this one.

Either way HF_HOME is a folder of the test's own, Xet is off, and what sleeps between retries sleeps a fiftieth of that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub

ROOT = Path(__file__).parents[1]
QUICKER = 50
QUICK = f"import time\n_sleep = time.sleep\ntime.sleep = lambda seconds: _sleep(seconds / {QUICKER})\n"
COMPRESS = "from mergekit_plus.__main__ import main\nmain()\n"


def environment(hub: Hub, home: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
    """The variables of a process that talks to this hub."""
    told = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    return {**kept, **told, **({"HF_TOKEN": token} if token else {}), **more}


def start(hub: Hub, code: str, *arguments: object, home: Path, cwd: Path | None = None, token: str | None = TOKEN, **more: str) -> subprocess.Popen[str]:
    """Begin to run code in a fresh interpreter whose Hub this is."""
    command = [sys.executable, "-c", QUICK + textwrap.dedent(code), *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment(hub, home, token, **more), **pipes)  # type: ignore[call-overload, no-any-return]


def finish(process: subprocess.Popen[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Wait for it; a hang is a failure."""
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def python(hub: Hub, code: str, *arguments: object, home: Path, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose Hub this is."""
    return finish(start(hub, code, *arguments, home=home, cwd=cwd, **more))


def compress(hub: Hub, *arguments: object, home: Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `compress` in a folder, against this hub."""
    return python(hub, COMPRESS, *arguments, home=home, cwd=cwd, **more)


def redirect(hub: Hub, home: Path, patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Turn the huggingface_hub of this process to this hub."""
    from huggingface_hub import close_session, constants, hf_api, hf_file_system

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(hf_api.api, "endpoint", hub.url)
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
                        "HF_TOKEN_PATH": str(home / "token"), "AGENT_HARNESSES_PATH": str(home / "harnesses.json")}.items():  # fmt: skip
        patch.setattr(constants, name, value)
    patch.delenv("HF_TOKEN", raising=False)
    if token:
        patch.setenv("HF_TOKEN", token)
    sleep = time.sleep
    patch.setattr(time, "sleep", lambda seconds: sleep(seconds / QUICKER))
    hf_file_system.HfFileSystem.clear_instance_cache()
    close_session()
