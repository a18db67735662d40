# SPDX-License-Identifier: Apache-2.0
"""What serving engines take of ours: a package or a module for each, named as the engine.

`vllm` makes the ensemble the law of a vLLM engine; `sglang` and `flashinfer` are functions of those
names, for any device. No engine is a dependency, and each is imported late. To add one, add its
module and its part of the pages (docs/engines.md, docs/drop-ins.md).
"""
