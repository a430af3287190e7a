"""`charlm.functional` under torch's name for it: the same module object."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from charlm.functional import *  # noqa: F403
else:
    from charlm import functional

    sys.modules[__name__] = functional  # the import statement returns this object
