"""The public names for editors and type checkers; at run time they are found when they are first asked for."""

from jaxtron.api.devices import simulate as simulate
from jaxtron.api.plans import rehearse as rehearse
from jaxtron.api.plans import search as search
from jaxtron.api.runs import export as export
from jaxtron.api.runs import open_run as open_run
from jaxtron.api.session import Session as Session
from jaxtron.api.settings import load as load
from jaxtron.config import UserError as UserError
from jaxtron.run.configuration import Configuration as Configuration
