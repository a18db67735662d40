# SPDX-License-Identifier: Apache-2.0
"""`python -m specens.cli` is `specens`."""

from specens.cli import main

if __name__ == "__main__":
    main()
