"""The verbs, in the order of the pipeline. Their files import click only; the work loads late."""

from __future__ import annotations

import click

from mla_deploy import __version__
from mla_deploy.cli.bench import bench
from mla_deploy.cli.build import build
from mla_deploy.cli.compress import compress
from mla_deploy.cli.doctor import doctor
from mla_deploy.cli.export import export
from mla_deploy.cli.inspect import inspect
from mla_deploy.cli.plan import plan
from mla_deploy.cli.quantize import quantize
from mla_deploy.cli.report import report
from mla_deploy.cli.rewrite import rewrite
from mla_deploy.cli.run import run
from mla_deploy.cli.validate import validate


class _PipelineOrder(click.Group):
    """Lists the verbs in the order they are used, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_PipelineOrder,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="mla-deploy")
@click.pass_context
def group(context: click.Context) -> None:
    """From a Multi-head Latent Attention checkpoint to a validated, running bundle."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_VERBS = (
    inspect, plan, compress, export, rewrite, quantize, build, validate, report, run, bench,
    doctor,
)  # fmt: skip
for _command in _VERBS:
    group.add_command(_command)
