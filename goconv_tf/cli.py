"""The installed commands: `goconv` is `python -m goconv_tf`, `goconv-train` is `python -m goconv_tf.train`."""

import runpy


def main():
    runpy.run_module("goconv_tf", run_name="__main__", alter_sys=True)


def train():
    runpy.run_module("goconv_tf.train", run_name="__main__", alter_sys=True)
