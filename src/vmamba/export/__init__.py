"""Models as files for other runtimes: ONNX, and OpenVINO's IR.

Needs the extra: pip install 'vmamba[export]'.
"""

from vmamba.export.check import Check
from vmamba.export.ir import Quantised
from vmamba.export.translation import TRANSLATIONS
from vmamba.export.writing import Exported, onnx, openvino

__all__ = ["TRANSLATIONS", "Check", "Exported", "Quantised", "onnx", "openvino"]
