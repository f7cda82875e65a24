"""Model folders on Hugging Face's hub, named hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION. Needs huggingface_hub."""

import functools
import re

from goconv_tf.errors import CheckpointError

PREFIX = "hf://"
_NAME = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)


@functools.cache
def fetch(name: str, files: tuple) -> str:
    """The folder in huggingface_hub's cache with those files of a repository; looked up once a process, downloaded if they are new.

    Raises:
      CheckpointError: if huggingface_hub is not installed, or the hub does not give the repository. Of files that it does not have,
        nothing is said.
    """
    match = _NAME.fullmatch(name)
    if not match or ".." in name:
        raise CheckpointError(f"{name}: must be hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION")
    repository, revision = match.groups()
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("huggingface_hub"):
            raise
        raise CheckpointError(f"{name}: huggingface_hub is not installed: pip install 'huggingface_hub>=0.36'") from None
    try:
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files))
    except errors.GatedRepoError:
        raise CheckpointError(f"{name}: the repository is gated: accept its terms, then log in with huggingface_hub") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"{name}: no such repository on the hub; a private one needs a login with huggingface_hub") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{name}: the repository has no revision {revision}") from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(f"{name}: the hub cannot be reached or has an error, and the model is not in the local cache") from None
    except Exception as error:  # of whatever HTTP library huggingface_hub uses
        text = " ".join(str(error).split())
        raise CheckpointError(f"{name}: cannot be downloaded ({type(error).__name__}: {text})") from error
