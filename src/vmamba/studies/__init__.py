"""The paper's studies, measured on one's own machine.

Throughput (Table 1), resolution (Table 4, Figure 11), the ladder of speed (Figure 9) and scan patterns
(Table 5, Figure 12).
"""

from vmamba.studies.run import Budget, run_study
from vmamba.studies.study import Conditions, Row, Speed, Study, Subject
from vmamba.studies.tables import PATTERNS, STUDIES
from vmamba.studies.writing import cells, remarks, write_report

__all__ = [
    "PATTERNS",
    "STUDIES",
    "Budget",
    "Conditions",
    "Row",
    "Speed",
    "Study",
    "Subject",
    "cells",
    "remarks",
    "run_study",
    "write_report",
]
