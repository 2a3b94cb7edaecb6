"""One HTML page with what runs learnt and how they were judged."""

from vmamba.report.page import report_page, write_report
from vmamba.report.records import Judgement, RunRecord, read_records

__all__ = ["Judgement", "RunRecord", "read_records", "report_page", "write_report"]
