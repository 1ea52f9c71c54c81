"""`lorakit doctor`: what this machine lacks, and the commands that fix it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.console import Console
    from lorakit.core.config import DoctorConfig


def run(config: "DoctorConfig", console: "Console") -> None:
    """Check this machine (packages, drivers, GPUs, kernels by running them, disks, the Hub) and say how to fix it.

    Example: lorakit doctor --for plan.json
    """
    from lorakit.core.doctor import diagnose

    diagnosis = diagnose(config, console.report)
    console.stop_progress()
    if config.doctor.report:
        console.say(diagnosis.text)
    else:
        console.findings(diagnosis.findings)
    console.result({**diagnosis.as_json(), **({"report": diagnosis.text} if config.doctor.report else {})})
    diagnosis.require_ok()
