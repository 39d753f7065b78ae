"""Models from the hub: list, choose, fetch into the client's own cache.

fetching does the work with types, settings (environment), client, listing, choice (which files), cache (where they
lie), transfer (bytes over HTTP), headers (ranged reads), contents (`zoo rm`) and errors.
"""

from zoo.loading.hub.choice import Chosen, choose
from zoo.loading.hub.contents import CachedRevision, cached, remove
from zoo.loading.hub.fetching import FetchPlan, fetch, plan_fetch
from zoo.loading.hub.headers import ranged_headers, read_file
from zoo.loading.hub.listing import list_files
from zoo.loading.hub.settings import cache_dir, offline
from zoo.loading.hub.types import HubSource, Note, Progress, Remote, RemoteFile

__all__ = [
    "CachedRevision",
    "Chosen",
    "FetchPlan",
    "HubSource",
    "Note",
    "Progress",
    "Remote",
    "RemoteFile",
    "cache_dir",
    "cached",
    "choose",
    "fetch",
    "list_files",
    "offline",
    "plan_fetch",
    "ranged_headers",
    "read_file",
    "remove",
]
