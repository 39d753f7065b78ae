"""Measuring: what the machine can do at most, and how near a loaded model comes to it."""

from zoo.bench.limits import machine_limits as machine_limits
from zoo.bench.limits import read_bandwidth as read_bandwidth
from zoo.bench.measure import Measurement as Measurement
from zoo.bench.measure import bytes_per_step as bytes_per_step
from zoo.bench.measure import decode_steps as decode_steps
from zoo.bench.measure import measure_decode as measure_decode
from zoo.bench.measure import measure_prefill as measure_prefill
from zoo.bench.measure import multiply_adds_of_prompt as multiply_adds_of_prompt
from zoo.bench.measure import random_prompts as random_prompts
from zoo.bench.measure import work_of as work_of
from zoo.bench.timing import seconds as seconds
from zoo.bench.traffic import Arrival as Arrival
from zoo.bench.traffic import Traffic as Traffic
from zoo.bench.traffic import arrivals as arrivals
from zoo.bench.traffic import measure_traffic as measure_traffic
