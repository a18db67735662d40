# SPDX-License-Identifier: Apache-2.0
"""Which way to decode is the fastest for given models: measured, predicted and compared."""
