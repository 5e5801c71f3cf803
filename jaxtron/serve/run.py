"""A model opened, its engine in this thread, and the network in another, until it is told to stop."""

import jax

from jaxtron import interrupts
from jaxtron.config import UserError
from jaxtron.generate.opening import open_model
from jaxtron.generate.source import ModelConfiguration
from jaxtron.runtime.memory_errors import out_of_memory_as_user_error
from jaxtron.runtime.start import start_runtime
from jaxtron.serve.app import WebServer, check_address, check_installed
from jaxtron.serve.request import ROWS, ServeRequest
from jaxtron.serve.service import Service

ROOM = "Lower --rows or --room, or raise --mesh.tensor"
NOTICE = "stopping once the requests are answered; once more ends at once"


def serve(request: ServeRequest, configuration: ModelConfiguration) -> None:
    """Answers until Ctrl-C or SIGTERM, and then what was asked before."""
    check_installed()
    check_address(request)
    start_runtime(configuration.config.runtime, devices=configuration.config.devices)
    if jax.process_count() > 1:
        raise UserError("serving is for one process; leave out --runtime.num_processes")
    told = configuration.told_defaults()
    if told is not None:
        print(told)
    with out_of_memory_as_user_error(ROOM), open_model(request.source, configuration, rows=ROWS) as model:
        if configuration.chat is not None:
            # what is wrong with a template is told now
            _ = model.chat
        service = Service(model, request.name, request.limits)
        server = WebServer(service, request)
        with interrupts.finish_first(NOTICE, service.worker.drain):
            server.start()
            host = f"[{request.host}]" if ":" in request.host else request.host
            rows = f"{model.engine.rows} at a time, {model.engine.room:,} tokens each"
            print(f"serving {request.name} at http://{host}:{server.port}/v1 ({rows})", flush=True)
            service.worker.run()
            server.stop()
    print("stopped")
