"""version: this program's own, and on request the daemon's.

Without --daemon it asks nobody, so that it works, and at once, wherever the program is installed.
"""

from __future__ import annotations

import json
from importlib.metadata import version as installed_version

from daemon.gpuctl.console import print_line
from daemon.gpuctl.session import Session


def version(session: Session, *, with_daemon: bool) -> None:
    """`gpuctl version`."""
    own = installed_version("hotbay")
    node = session.client.node() if with_daemon else None
    if session.json:
        fields = {"gpuctl": own}
        if node is not None:
            fields["hotbayd"] = node.version
        print(json.dumps(fields))
        return
    print_line(f"gpuctl {own}")
    if node is not None:
        print_line(f"hotbayd {node.version} on {node.hostname}")
