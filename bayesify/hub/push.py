"""Upload a model folder to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bayesify.errors import BayesifyError
from bayesify.files import CONFIG_FILE, TOKENIZER_FILES
from bayesify.hub.load import read_config
from bayesify.hub.origin import origin_of
from bayesify.hub.save import save_pretrained

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

_UPLOADED = ["*.json", "*.safetensors", "*.md", "*.png", *TOKENIZER_FILES]


def push_to_hub(
    model: BayesianModel, repo_id: str, *, private: bool | None = None, full: bool = False, message: str | None = None
) -> str:
    """Save the model and upload it in one commit; returns the address of the repository.

    A base model from a folder of this machine is of no use to others: then all its weights are uploaded too.
    """
    origin = model.origin or origin_of(model.model)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, full=full or origin.is_local)
        return push_folder(folder, repo_id, private=private, message=message)


def push_folder(folder: str | Path, repo_id: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Upload a folder written by `save_pretrained`, in one commit.

    Raises:
        FormatError: the folder holds no bayesify model.
        BayesifyError: it cannot be used by others as it is, or the Hub refused.
    """
    from huggingface_hub import HfApi

    config = read_config(Path(folder) / CONFIG_FILE)
    if config["weights"] == "changed" and config["base_model"].is_local:
        raise BayesifyError(
            f"{folder} builds on the weights in {config['base_model'].id}, which others do not have; "
            "save it with full weights (--full) and push again."
        )
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=str(folder),
            allow_patterns=_UPLOADED,
            ignore_patterns=["checkpoint/*", ".*"],
            commit_message=message or "Upload a Bayesian model with bayesify",
        )
    except Exception as error:  # http libraries, proxies and the Hub each have their own errors
        raise BayesifyError(f"{repo_id} could not be uploaded: {' '.join(str(error).split())[:400]}") from error
    return str(address)
