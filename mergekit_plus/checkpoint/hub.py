"""Models on the Hub: their safetensors and small files through huggingface_hub's own cache."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .folder import ADAPTER, ADAPTER_CONFIG, CARRIED

PATIENCE = 10  # seconds for the Hub to say anything at all


def download(ref: str) -> Path:
    """Bring `org/name[@revision]` into the local Hub cache and return its folder.

    Errors: CheckpointError for a repository that is missing, gated or out of reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repo, _, revision = ref.partition("@")
    try:
        offline = not _hub_answers(repo, revision or None)
        wanted = ["model*.safetensors*", ADAPTER, ADAPTER_CONFIG, *CARRIED]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted, local_files_only=offline))
    except HFValidationError as error:
        raise CheckpointError(f"{repo}: no such file or folder, and not a name that the Hub could have: {error}") from None
    except GatedRepoError:
        raise CheckpointError(f"{repo} is gated: ask for access on its page, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo}: no such file or folder, and no such repository on the Hub (or it is private: `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision '{revision}'") from None
    except Exception as error:  # among them whatever the HTTP library of the day raises, which is not an OSError
        raise CheckpointError(f"{repo}: not a local path, and the Hub cannot be reached ({type(error).__name__})") from None


def _hub_answers(repo: str, revision: str | None) -> bool:
    """Whether the Hub answers at all: `snapshot_download` waits for its listing for ever."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().repo_info(repo, revision=revision, timeout=PATIENCE)
    except HFValidationError:
        raise
    except HfHubHTTPError:
        return True  # an answer: what it means is for `snapshot_download` to say
    except Exception:  # whatever the HTTP library of the day raises for a connection that fails or is silent
        return False
    return True
