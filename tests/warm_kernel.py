"""Jupyter kernels that start at once, for tests that start one for every lesson.

The kernel is the real ipykernel, forked from a process that has imported what lessons import (see warm_python.py): the same connection file,
messages, interrupts and end. The kernel specification `python3` in a folder of JUPYTER_PATH names the shim in the interpreter's place.

    os.environ['JUPYTER_PATH'] = warm_kernels()  # the same ones for all files of a test process
    NotebookClient(nb, kernel_name='python3').execute()
"""
import atexit, functools, json, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

from warm_python import SHIM, listen


def load():
    """Import what a kernel and the lessons import, and draw a picture: the first one finds and measures the fonts."""
    import importlib
    for name in 'ipykernel.kernelapp ipykernel.ipkernel ipykernel.zmqshell IPython ipywidgets pyarrow.parquet rustbpe safetensors.torch tiktoken torch._dynamo'.split(): importlib.import_module(name)
    from nanochat import viz
    fig, ax = viz.figure(3, 2)
    ax.plot([1, 2], label='a')
    ax.legend()
    viz.picture(fig, 'a')


def serve(path):
    """Load, listen, fork."""
    load()
    listen(path)


class WarmKernels:
    """The folder with the specification, and the process behind it."""
    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix='warm'))
        (self.folder/'shim.py').write_text(SHIM)
        path, self.path = self.folder/'socket', str(self.folder/'jupyter')
        env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='Agg', NANOCHAT_BASE_DIR=str(self.folder/'base'),
                                JPY_PARENT_PID='1')  # to ipykernel: do not watch the parent. Here the shim is watched: a kernel without it is killed.
        self.process = subprocess.Popen([sys.executable, __file__, str(path)], env=env)
        argv = [sys.executable, '-IS', str(self.folder/'shim.py'), '-m', 'ipykernel_launcher', '-f', '{connection_file}']
        spec = Path(self.path)/'kernels'/'python3'
        spec.mkdir(parents=True)
        (spec/'kernel.json').write_text(json.dumps(dict(argv=argv, display_name='python3', language='python', env=dict(WARM_PYTHON=str(path), PYTHON_EXEC=sys.executable))))
        while not path.exists():
            assert self.process.poll() is None, 'the warm kernel did not start'
            time.sleep(.02)
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder)


@functools.cache
def warm_kernels():
    """The folder for JUPYTER_PATH; the process ends with this one."""
    warm = WarmKernels().__enter__()
    atexit.register(warm.__exit__)
    return warm.path


if __name__ == '__main__': serve(sys.argv[1])
