# SPDX-License-Identifier: Apache-2.0
"""Serving engines whose verified law is the ensemble's: a package for each, imported late.

No engine is a dependency. To add one, add its package and its part of docs/engines.md.
"""
