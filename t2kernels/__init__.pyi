# What `import t2kernels` offers, for type checkers: at run time each name is imported when it is first used.
from t2kernels.experts.bank import ExpertBank as ExpertBank
from t2kernels.experts.exchange.lora import LoraAdapter as LoraAdapter
from t2kernels.experts.expert import Expert as Expert
from t2kernels.experts.expert import ExpertError as ExpertError
from t2kernels.experts.expert import ExpertMismatch as ExpertMismatch
from t2kernels.factors.decomposition import decompose as decompose
from t2kernels.factors.factor import Factor as Factor
from t2kernels.factors.store import Factors as Factors
from t2kernels.ops import svf_linear as svf_linear
from t2kernels.ops import svf_linear_group as svf_linear_group
from t2kernels.ops import svf_linear_ref as svf_linear_ref
from t2kernels.patching.counting import ParameterCount as ParameterCount
from t2kernels.patching.counting import count_parameters as count_parameters
from t2kernels.patching.explain import Explanation as Explanation
from t2kernels.patching.explain import explain as explain
from t2kernels.patching.patch import patch_model as patch_model
from t2kernels.patching.patch import unpatch_model as unpatch_model

from . import adapt as adapt
from . import evaluation as evaluation
from . import tasks as tasks
from . import tiny as tiny
from . import train as train

class T2Error(Exception): ...
class InputError(T2Error, ValueError): ...
class InputTypeError(T2Error, TypeError): ...
class UnknownNameError(T2Error, KeyError): ...
class OutOfRangeError(T2Error, IndexError): ...
class MissingFileError(T2Error, FileNotFoundError): ...
class HubError(T2Error, OSError): ...
class StateError(T2Error, RuntimeError): ...
class PackageError(T2Error, ModuleNotFoundError): ...

def printable(value: object) -> str: ...
def one_line(e: BaseException) -> str: ...
