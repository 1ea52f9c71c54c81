"""The model hub: whether it answers, and takes the token. No torch."""

import re

from lorakit.core.doctor.finding import Finding, Need, fail, ok, skip, warn
from lorakit.core.environment import variables
from lorakit.core.errors import first_line

_ON = ("1", "true", "yes", "on")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_SECONDS = 8


def hub(need: Need) -> Finding:
    """Whether the Hub answers, and whether it takes the token, which is shown nowhere."""
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        return skip("huggingface_hub isn't installed; see packages")
    offline = {name: value for name, value in variables(*_OFFLINE).items() if value.lower() in _ON}
    if offline:
        listed = " and ".join(f"{name}={value}" for name, value in offline.items())
        return skip(f"{listed}: the Hub isn't asked, only its cache", f"unset {' '.join(offline)}")
    token = huggingface_hub.get_token()
    host = re.sub(r"^https?://|/.*$", "", constants.ENDPOINT)
    where = f"{host} (HF_ENDPOINT)" if variables("HF_ENDPOINT") else host
    try:
        session = huggingface_hub.get_session()
        answer = session.head(constants.ENDPOINT, timeout=_SECONDS)
        if answer.status_code >= 500:
            return skip(
                f"{where} is out of order ({answer.status_code})", "try again later; HF_ENDPOINT names a mirror"
            )
        if token is None:
            return ok(f"{where} answers ({answer.status_code}); no token, so public models and datasets only")
        huggingface_hub.HfApi().whoami(token=token)
        return ok(f"{where} answers and takes the token")
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        return _refused(where, error)
    except Exception as error:  # whatever a connection can fail with
        return _unreachable(where, error)


def _refused(where: str, error: Exception) -> Finding:
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return fail(
            f"found that {where} refuses the token (401), need a valid one or none",
            "with a wrong token even public models are refused",
            "hf auth login (or correct or unset HF_TOKEN)",
        )
    return _unreachable(where, error)


def _unreachable(where: str, error: Exception) -> Finding:
    """No network is no failure; a certificate that isn't trusted, or a proxy that doesn't answer, is a mistake."""
    reason = first_line(error)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return warn(
            f"found that the certificate of {where} isn't trusted ({reason})",
            "a company's proxy that reads along has its own certificate",
            "export SSL_CERT_FILE=/path/to/your/company's/certificates.pem",
        )
    if proxies := variables(*_PROXIES):
        named = ", ".join(proxies)
        return warn(
            f"found no answer of {where} through the proxy of {named} ({reason}), need one",
            "models and datasets can't be downloaded",
            f"correct {named}, or unset it",
        )
    return skip(
        f"no answer of {where} ({reason}): models and datasets can't be downloaded",
        "connect this machine, or give folders instead of hub ids; HF_ENDPOINT names a mirror",
    )
