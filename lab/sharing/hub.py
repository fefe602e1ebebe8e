"""Uploads a shared folder to the Hugging Face hub, one version per upload.

huggingface_hub finds the token where `hf auth login` stored it, or in HF_TOKEN. This module never
reads, prints or stores it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.core import UserError, checkpoints, runtime


def check_name(repository: str) -> None:
    """Raises: UserError, unless a name is `owner/name` as the hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(
            f"REPOSITORY={repository!r} must be owner/name, with letters, digits, '-', '_' and '.',"
            " such as anna/pets-vit"
        )


def upload(folder: Path, repository: str, private: bool, overwrite: bool) -> tuple[str, str]:
    """Uploads a folder as the next version of a model, and tags it v1, v2, ...

    Files that are already there are not uploaded again, so an interrupted upload resumes. A folder
    that has not changed gets no new version.

    Args:
        folder: what share.py has written.
        repository: owner/name; created if it does not exist.
        private: only you, or members of the organization that owns it, can see it.
        overwrite: replace a different model in the repository.

    Returns: the version and the address of the repository.
    Raises: UserError, if the hub cannot be reached or refuses, or the repository contains another
        model.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    page = f"{api.endpoint}/{repository}"
    with _explain(repository, api.endpoint):
        api.whoami()  # a missing or invalid token is the most common mistake
        exists = _create(api, repository, private)
        if exists:
            if private and not api.repo_info(repository).private:
                raise UserError(
                    f"{page} exists and is public: make it private in its settings, or choose "
                    "another --repository"
                )
            if not overwrite:
                _check_same_model(api, repository, folder)
        versions = _versions(api, repository)
        number = max(versions, default=0) + 1
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Version v{number}",
            delete_patterns="*" if exists else None,  # files of the version before
        )  # fmt: skip
        if number > 1 and versions[number - 1] == commit.oid:
            return f"v{number - 1}", page
        api.create_tag(repository, tag=f"v{number}", revision=commit.oid)
    return f"v{number}", page


def _create(api: Any, repository: str, private: bool) -> bool:
    """Creates a repository. Returns: whether it existed before."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repository, private=private)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        return True
    return False


def _versions(api: Any, repository: str) -> dict[int, str]:
    """The commits of the tags v1, v2, ..., by number."""
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repository).tags}
    return {int(m[1]): tags[m[0]] for name in tags if (m := re.fullmatch(r"v([1-9]\d*)", name))}


def _check_same_model(api: Any, repository: str, folder: Path) -> None:
    """Raises: UserError, if a repository contains another model than this one.

    A better model for the same classes is the next version; other classes are another model.
    """
    files = set(api.list_repo_files(repository)) - {".gitattributes", "README.md"}
    if not files:
        return  # new, or its first upload was interrupted
    ours = checkpoints.read_json(folder / "config.json")["label_names"]
    theirs = None
    if "config.json" in files:
        try:
            path = Path(api.hf_hub_download(repository, "config.json"))
            theirs = checkpoints.read_json(path).get("label_names")
        except UserError:  # not JSON
            theirs = None
    if theirs != ours:
        what = f"a model of {len(theirs)} other classes" if theirs else "something else"
        raise UserError(
            f"{api.endpoint}/{repository} already contains {what}: choose another --repository, or "
            "replace it with --overwrite (its tagged versions stay)"
        )


@contextmanager
def _explain(repository: str, endpoint: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence with advice."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    owner = repository.split("/")[0]
    try:
        yield
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"there is no Hugging Face token: create one with write access at {endpoint}/settings/"
            "tokens, and store it with `hf auth login`"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            "HF_HUB_OFFLINE is set, so nothing is uploaded: unset it and run the same command again"
        ) from error
    except Exception as error:  # of a different type for each cause
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            message = (
                "the hub does not accept the token: store a valid one with `hf auth login`, and "
                "unset HF_TOKEN if it is set"
            )
        elif status == 403:
            message = (
                f"the token has no permission to write to {repository}: it needs write access, and "
                f"{owner} must be your user name or your organization"
            )
        elif status == 409:
            message = f"{repository} changed during the upload: run the same command again"
        elif status:
            message = f"the hub refused with status {status}: {_first_line(error)}"
        else:
            message = (
                f"{endpoint} cannot be reached or the connection was lost: {_first_line(error)}; "
                "the same command continues the upload"
            )
        raise UserError(f"{message}. The folder on this computer is complete.") from error


def _first_line(error: BaseException) -> str:
    """The first line of an error, without what looks like a token."""
    return re.sub(r"hf_\w{4,}", "hf_***", runtime.first_line(error)).rstrip(".")
