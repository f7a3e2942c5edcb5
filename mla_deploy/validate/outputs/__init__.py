"""A validation report as files: JSON by a versioned schema, JUnit XML, Markdown, one-file HTML.

Every writer takes a `ValidationReport` or what its `to_dict` gave, so that a report made elsewhere
can be read (`read_report`) and rendered again.
"""

from mla_deploy.validate.outputs.destinations import SUFFIXES, check_destination, write_report
from mla_deploy.validate.outputs.html_page import write_html
from mla_deploy.validate.outputs.json_file import write_json
from mla_deploy.validate.outputs.junit import write_junit
from mla_deploy.validate.outputs.markdown import write_markdown
from mla_deploy.validate.outputs.reading import read_report, require_schema
from mla_deploy.validate.outputs.replaced import Facts, Report, facts_of
from mla_deploy.validate.outputs.schema import SCHEMA_VERSION

__all__ = [
    "SCHEMA_VERSION",
    "SUFFIXES",
    "Facts",
    "Report",
    "check_destination",
    "facts_of",
    "read_report",
    "require_schema",
    "write_html",
    "write_json",
    "write_junit",
    "write_markdown",
    "write_report",
]
