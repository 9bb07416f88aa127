"""One knob at a time: what a flat ring over four nodes of eight GPUs waits for, and what would help.

python examples/what_if.py
"""

import ringsim
from ringsim.units import format_time

WORKLOAD = ringsim.Workload(q_len=131072, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
KNOBS = {
    "as it is": {},
    "one NIC per node": {"nics": 1},
    "one NIC per node, round-robin": {"nics": 1, "place": "round-robin"},
    "a network of 800 Gbit/s": {"links.ndr.bandwidth": "800 Gbit/s"},
    "and a transport that uses it": {"links.ndr.bandwidth": "800 Gbit/s", "transports.nccl.paths.ndr.bandwidth": "60 GB/s"},
    "a spine oversubscribed 4 : 1": {"machine.oversubscription": 4},
    "one GPU at half speed": {"devices.slow": {"like": "h100", "speed": 0.5}, "replace": {"dgx-2/h100-5": "slow"}},
}

print(f"{'what if':<32} {'total':>9}  {'exposed communication':>21}  {'waiting for a late peer':>23}")
for what, settings in KNOBS.items():
    machine = ringsim.load_topology("dgx-h100-cluster", {"nodes": 4} | settings)
    schedule = ringsim.Schedule(workload=WORKLOAD, world_size=32)
    timeline = ringsim.simulate(schedule, machine)
    exposed_s = ringsim.exposed_communication_s(schedule, machine)
    times = [format_time(seconds) for seconds in (timeline.total_s, exposed_s, timeline.late_s())]
    print(f"{what:<32} {times[0]:>9}  {times[1]:>21}  {times[2]:>23}")
