"""A supervisor from its configuration to the exit code of the run."""

import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack

from jaxtron.config import UserError
from jaxtron.interrupts import TRY_AGAIN, StopRequest, finish_first
from jaxtron.launch.children import Children, visible_gpus
from jaxtron.launch.codes import SAVED
from jaxtron.launch.fitting import Fitting
from jaxtron.launch.leader import Leader
from jaxtron.launch.member import LifeSign, Lineup
from jaxtron.launch.rendezvous import Rendezvous, RendezvousLost, free_port, serving
from jaxtron.launch.request import LaunchRequest
from jaxtron.launch.supervisor import Supervisor
from jaxtron.run.configuration import Configuration
from jaxtron.runtime.machine import has_driver

SIGNS, LINEUP = "jaxtron/sign/", "jaxtron/lineup/"
# between two looks at the processes and the line-up
TICK_SECONDS = 0.5
# where JAX puts its coordinator under Slurm
SLURM_FIRST_PORT, SLURM_PORTS = 65535 - 2**12 + 1, 2**12
# for others to read that all is over, before the service ends
FAREWELL_SECONDS = 10.0


def supervise(request: LaunchRequest, config: Configuration) -> int:
    """The run's exit code, or 75 where hosts were lost too often, or too few came."""
    host, port = _meeting_place(request)
    gpus = visible_gpus() if has_driver() and config.devices is None else []
    fitting = Fitting(config, most=request.most, devices=_devices(request, config, gpus))
    for hosts, why in fitting.refusals(request.fewest, request.most).items():
        say(f"of {hosts} hosts not all can train, and some would wait: {why}")
    member = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    children = Children([*request.command, *request.settings], gpus)
    supervisor = Supervisor(member, socket.gethostname(), children, count=request.processes, say=say)
    with ExitStack() as stack:
        stack.callback(children.kill)
        stop = stack.enter_context(finish_first("asking the run to save and stop; once more to end it at once"))
        deadline = time.monotonic() + request.wait_seconds
        while True:
            with serving(host, port, is_alone=request.most == 1) as is_leader:
                leader = None
                if is_leader:
                    service = uuid.uuid4().hex
                    leader = Leader(
                        request, fitting, member, service=service, coordinator=lambda: f"{host}:{free_port()}", say=say
                    )
                try:
                    rendezvous = Rendezvous(f"{host}:{port}")
                except RendezvousLost:
                    pass
                else:
                    stack.callback(rendezvous.close)
                    try:
                        return _meet(rendezvous, supervisor, leader, stop)
                    except RendezvousLost:
                        say(f"the rendezvous at {host}:{port} gives no answer any more; waiting for it")
                        supervisor.lost()
                        deadline = time.monotonic() + request.wait_seconds
            if stop.is_made:
                return 130
            if time.monotonic() >= deadline:
                say(f"error: the rendezvous at {host}:{port} gave no answer for {request.wait_seconds:g} s")
                return TRY_AGAIN
            time.sleep(TICK_SECONDS)


def _meet(rendezvous: Rendezvous, supervisor: Supervisor, leader: Leader | None, stop: StopRequest) -> int:
    """Follows line-ups, and gives them out where this is the leader; the exit code."""
    while True:
        sign = supervisor.sign(leaving=stop.is_made)
        if leader is None:
            lineup = _heard(rendezvous, sign)
        else:
            signs = _signs(rendezvous, sign)
            lineup = leader.decide(time.monotonic(), signs)
            rendezvous.exchange({f"{LINEUP}now": lineup.text()}, [])
        code = None if lineup is None else supervisor.follow(lineup)
        if code is not None and lineup is not None:
            if leader is not None:
                _farewell(rendezvous, supervisor, leader)
            else:
                rendezvous.exchange({f"{SIGNS}{sign.member}": supervisor.sign().text()}, [])
            is_well = code == 0 or code in SAVED
            if lineup.over is not None and lineup.note and (leader is not None or not is_well):
                say(f"{'' if is_well else 'error: '}{lineup.note}; exit code {code}")
            return code
        time.sleep(TICK_SECONDS)


def _heard(rendezvous: Rendezvous, sign: LifeSign) -> Lineup | None:
    """The leader's word; None before its first."""
    found = rendezvous.exchange({f"{SIGNS}{sign.member}": sign.text()}, [LINEUP])[LINEUP]
    return next((Lineup.of(text) for text in found.values()), None)


def _signs(rendezvous: Rendezvous, sign: LifeSign) -> list[LifeSign]:
    """Those of all members, with the own one."""
    found = rendezvous.exchange({f"{SIGNS}{sign.member}": sign.text()}, [SIGNS])[SIGNS]
    return [LifeSign.of(text) for text in found.values()]


def _farewell(rendezvous: Rendezvous, supervisor: Supervisor, leader: Leader) -> None:
    """Serves until the others have read that all is over."""
    deadline = time.monotonic() + FAREWELL_SECONDS
    while leader.has_company(time.monotonic(), _signs(rendezvous, supervisor.sign())):
        if time.monotonic() >= deadline:
            return
        time.sleep(TICK_SECONDS)


def _meeting_place(request: LaunchRequest) -> tuple[str, int]:
    if request.rendezvous is not None:
        return request.rendezvous
    if request.most == 1:
        return "127.0.0.1", free_port()
    if (found := slurm_first_node(os.environ)) is not None:
        return found
    raise UserError(
        "--rendezvous is missing: a port of the first host that all reach, such as --rendezvous node001:29400"
    )


def slurm_first_node(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """The first node of a step of Slurm, and a port by the job's number; None outside of Slurm."""
    nodes, job = environment.get("SLURM_STEP_NODELIST", ""), environment.get("SLURM_JOB_ID", "")
    # n[001-004,007] or n1,n2
    found = re.match(r"([^,\[\s]+)(?:\[(\d+))?", nodes)
    if found is None or not job.isdecimal():
        return None
    return found[1] + (found[2] or ""), SLURM_FIRST_PORT + int(job) % SLURM_PORTS


def _devices(request: LaunchRequest, config: Configuration, gpus: list[str]) -> int:
    """Devices of a host, all processes together."""
    if config.runtime.coordinator_address is not None:
        raise UserError(
            "runtime.coordinator_address and its siblings are the supervisor's to set: leave them out, and say "
            "--rendezvous"
        )
    if config.devices is not None:
        return config.devices * request.processes
    if not gpus:
        return request.processes
    if len(gpus) % request.processes:
        raise UserError(
            f"--processes-per-node {request.processes} does not divide the {len(gpus)} GPUs of this host; change it, "
            "or choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    return len(gpus)


def say(line: str) -> None:
    """A line of a supervisor among those of its processes."""
    print(f"launch: {line}", file=sys.stderr, flush=True)
