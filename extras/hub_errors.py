"""What to do about the exceptions of huggingface_hub."""

from huggingface_hub import errors


def advice(error: Exception, source: str, flag: str) -> str:
    """What to do about an exception that came up when `source` was asked for, a repository on the hub."""
    offline = "check the network, or take --model tiny, needing none"
    if flag in ("--lora", "--base_lora"):
        offline = "check the network, and the spelling if it is a folder here"
    # the more particular classes come first: these are HfHubHTTPErrors or HTTPErrors, too
    if isinstance(error, errors.GatedRepoError):
        return f"accept its terms on huggingface.co/{source}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, nor on the hub: check it, or run `hf auth login`"
    if isinstance(error, errors.HFValidationError):
        return "no such folder, and no hub id either: check the spelling"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"it is not in the cache, and HF_HUB_OFFLINE is set: {offline}"
    if isinstance(error, (errors.HfHubHTTPError, errors.LocalTokenNotFoundError)):
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", "")
        return f"error {status}: wait, or run `hf auth login`"
    if isinstance(error, (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError)):
        if "Timeout" in type(error).__name__:
            return f"the hub does not answer: {offline}"
        return f"the hub can't be reached: {offline}"
    return f"{error}: make room, or set HF_HOME to a place on another disk"
