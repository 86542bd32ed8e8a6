"""A submitted job watched from outside: its log as it comes, its exit code, and in one sentence why it failed."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

from mtrec.jobs.cluster import choose_address, connect_client

ACTIVE = ("PENDING", "RUNNING")
STOPPED_CODE = 143  # as of a process that SIGTERM ended
SETTLE_SECONDS = 30.0  # from the end of the log to the final status
RECONNECTS, RECONNECT_SECONDS = 6, 5.0
_RAYS_OWN_LINES = re.compile(r"^(Running entrypoint for job |.*\bINFO (job_manager|packaging|worker)\.py:\d+ )")
_TRACEBACK_END = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*", re.MULTILINE)


def follow(client: Any, job: str, address: str, say: Callable[[str], None], ask: Callable[[str], str] | None) -> int:
    """Prints the log of a job until it ends; returns its exit code.

    Ctrl-C asks whether to stop the job or leave it; with nobody to ask it is left. A failed job's first cause is said last.
    """
    log = Log(say)
    while True:
        try:
            asyncio.run(_stream(client, job, log))
            return _ended(client, job, address, log.text, say)
        except KeyboardInterrupt:
            answer = ask(f"job {job}: stop it (s), leave it running (l), or go on watching (w)?") if ask else "l"
            if answer.strip().lower().startswith("s"):
                client.stop_job(job)
                say(f"job {job} is being stopped; the same submit continues its run from the newest checkpoint")
                return STOPPED_CODE
            if answer.strip().lower().startswith("l"):
                say(f"job {job} runs on. Watch it: mtrec jobs logs {job} --follow --address {address}")
                return 0


class Log:
    """The log of a job so far; prints each line once, also where the stream begins anew."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.text = ""
        self._say = say
        self._printed = 0

    def restart(self) -> None:
        """The stream begins anew: forgets the text, but not how far it was printed."""
        self.text = ""

    def add(self, text: str) -> bool:
        """Takes more of the log and prints the lines that are whole and new; whether there was one."""
        self.text += text
        before = self._printed
        while (end := self.text.find("\n", self._printed)) >= 0:
            line = self.text[self._printed : end]
            self._printed = end + 1
            if not _RAYS_OWN_LINES.match(line):
                self._say(line)
        return self._printed > before

    def finish(self) -> None:
        """Prints a last line that has no newline."""
        if self.text and not self.text.endswith("\n"):
            self.add("\n")


async def _stream(client: Any, job: str, log: Log) -> None:
    import aiohttp

    failures = 0
    while True:
        log.restart()  # the cluster sends the log from its start
        try:
            async for text in client.tail_job_logs(job):
                if log.add(text):
                    failures = 0  # of losses in a row without a new line: a job may run for days
            if client.get_job_info(job).status not in ACTIVE:
                log.finish()
                return
            failures = 0  # it was the cluster that ended the stream, and it answers
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            failures += 1
            if failures > RECONNECTS:
                if _has_ended(client, job):
                    log.finish()
                    return
                raise ValueError(
                    f"The connection to the cluster was lost: {error}. The job runs on; see mtrec jobs status {job}."
                ) from error
        await asyncio.sleep(RECONNECT_SECONDS if failures else 1.0)


def _has_ended(client: Any, job: str) -> bool:
    """Whether the cluster says so; not where it says nothing."""
    try:
        return client.get_job_info(job).status not in ACTIVE
    except (OSError, RuntimeError):
        return False


def _details(client: Any, job: str) -> Any:
    """What the cluster knows of a job, asked again for a while where it does not answer."""
    tries = 0
    while True:
        try:
            return client.get_job_info(job)
        except (OSError, RuntimeError) as error:
            tries += 1
            if tries > RECONNECTS:
                raise ValueError(f"The connection to the cluster was lost: {error}. See mtrec jobs status {job}.") from error
        time.sleep(RECONNECT_SECONDS)


def _ended(client: Any, job: str, address: str, log: str, say: Callable[[str], None]) -> int:
    """The exit code of an ended job; says why it failed."""
    deadline = time.monotonic() + SETTLE_SECONDS
    details = _details(client, job)
    while details.status in ACTIVE and time.monotonic() < deadline:
        time.sleep(0.5)
        details = _details(client, job)
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        say(f"job {job} was stopped; the same submit continues its run from the newest checkpoint")
        return STOPPED_CODE
    code = int(details.driver_exit_code or 1)
    code = code if code > 0 else 128 - code  # by a signal, as a shell gives it
    say(f"job {job} failed (exit code {code}): {first_cause(details, log)}")
    say(f"whole log: mtrec jobs logs {job} --address {address}")
    return code


def first_cause(details: Any, log: str) -> str:
    """Why a job failed, in words: what mtrec said, else the error that came first, never Ray's stack."""
    code = details.driver_exit_code
    if re.search(r"No module named '?mtrec\b", log):
        return (
            "mtrec is not installed on the cluster, or not for the `python` that its nodes find first. Use the image of "
            "deploy/Dockerfile, or send it along with --with-code."
        )
    if code == 127:
        return "the cluster's nodes find no `python`. Start Ray on them from the environment that holds mtrec (deploy/README.md)."
    said = log.rfind("\nerror: ")
    if said >= 0 or log.startswith("error: "):
        return log[said + 1 :].removeprefix("error: ").strip()
    if "Traceback (most recent call last)" in log:
        ends = _TRACEBACK_END.findall(log)
        if ends:
            return str(ends[-1]).strip()
    if code in (-9, 137):
        return "it was killed from outside; as a rule the node ran out of memory (see its log, `mtrec jobs logs`)."
    message = (details.message or "").strip().splitlines()
    return message[-1] if message else "the cluster gives no reason."


def list_jobs(address: str | None) -> tuple[list[dict[str, str]], str | None]:
    """(rows of a table of the cluster's jobs, the newest first; a line about the address)."""
    address, note = choose_address(address)
    rows = []
    for details in sorted(_submissions(connect_client(address)), key=lambda each: -(each.start_time or 0)):
        known = details.metadata or {}
        rows.append(
            {
                "job": str(details.submission_id),
                "status": str(details.status.value),
                "command": known.get("mtrec_command", "-"),
                "run": known.get("mtrec_output", "-"),
                "user": known.get("mtrec_user", "-"),
                "started": time.strftime("%Y-%m-%d %H:%M", time.localtime((details.start_time or 0) / 1000)),
                "minutes": f"{((details.end_time or time.time() * 1000) - (details.start_time or 0)) / 60_000:.1f}",
            }
        )
    return rows, note


def _submissions(client: Any) -> list[Any]:
    return [details for details in client.list_jobs() if details.submission_id is not None]


def find_job(client: Any, name: str) -> Any:
    """The job with this id, else the newest one of the run with this name or folder. Raises ValueError naming the known ones."""
    known = _submissions(client)
    for details in known:
        if details.submission_id == name:
            return details
    ofrun = [
        details
        for details in known
        if name in ((details.metadata or {}).get("mtrec_run"), (details.metadata or {}).get("mtrec_output"))
    ]
    if ofrun:
        return max(ofrun, key=lambda details: details.start_time or 0)
    ids = ", ".join(sorted(details.submission_id for details in known)) or "none"
    raise ValueError(f"There is no job or run '{name}' on this cluster. Jobs: {ids}.")


def job_status(address: str | None, name: str) -> dict[str, str]:
    """What is known of a job, a failed one with its first cause."""
    client = connect_client(choose_address(address)[0])
    details = find_job(client, name)
    known = details.metadata or {}
    found = {
        "job": str(details.submission_id),
        "status": str(details.status.value),
        "run": known.get("mtrec_output", "-"),
        "command": str(details.entrypoint),
    }
    if details.status == "FAILED":
        found["exit code"] = str(details.driver_exit_code)
        found["cause"] = first_cause(details, _logs(client, details))
    return found


def _logs(client: Any, details: Any) -> str:
    text: str = client.get_job_logs(details.submission_id) or ""
    return text


def job_logs(address: str | None, name: str, *, wait: bool, say: Callable[[str], None], ask: Callable[[str], str] | None) -> int:
    """Prints a job's log; with `wait`, until the job ends. Returns 0, or the job's exit code once it has ended."""
    address = choose_address(address)[0]
    client = connect_client(address)
    details = find_job(client, name)
    if wait:
        return follow(client, str(details.submission_id), address, say, ask)
    log = Log(say)
    log.add(_logs(client, details))
    log.finish()
    return 0


def stop_job(address: str | None, name: str) -> str:
    """Stops a job (SIGTERM, after some seconds SIGKILL); returns a line on what happened."""
    client = connect_client(choose_address(address)[0])
    details = find_job(client, name)
    if details.status not in ACTIVE:
        return f"job {details.submission_id} has ended already: {details.status.value}"
    client.stop_job(details.submission_id)
    return f"job {details.submission_id} is being stopped; the same submit continues its run from the newest checkpoint"
