"""An OCI runtime for test machines: runc, less the rlimits that this machine may not grant.

A machine without CAP_SYS_RESOURCE may not raise memlock to unlimited, and runc would refuse the container.
What was asked for is in Docker's own record (docker inspect), where the tests read it.
"""

import json
import os
import resource
import sys


def grantable(limit):
    return limit["hard"] <= resource.getrlimit(getattr(resource, limit["type"]))[1] % 2**64


path = None
if "create" in sys.argv:
    path = os.path.join(sys.argv[sys.argv.index("--bundle") + 1], "config.json")
elif "exec" in sys.argv:
    path = sys.argv[sys.argv.index("--process") + 1]
if path:
    with open(path) as file:
        config = json.load(file)
    process = config.get("process", config)
    process["rlimits"] = [limit for limit in process.get("rlimits", []) if grantable(limit)]
    with open(path, "w") as file:
        json.dump(config, file)
os.execvp("runc", ["runc", *sys.argv[1:]])
