import os
import signal
import time

import pytest

from bqat_jax.distributed.preemption import Deadline, Stopped, StopRequest


def test_a_deadline_is_a_request_to_stop():
    with StopRequest(deadline=Deadline(time.monotonic() + 3600, 'sweep_minutes=60')) as stop:
        assert not stop.is_due()
        stop.check('nowhere')
    with StopRequest(deadline=Deadline(time.monotonic(), 'sweep_minutes=60')) as stop:
        with pytest.raises(Stopped, match=r'Stopped by sweep_minutes=60 after step 3\. Run the same command again'):
            stop.check('after step 3')
        assert stop.is_due()


def test_a_signal_comes_before_a_deadline():
    noted = []
    with StopRequest(lambda: noted.append(1), Deadline(time.monotonic(), 'sweep_minutes=60')) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match='Stopped by SIGTERM here'):
            stop.check('here')
    assert noted == [1]
