"""Four machines with eight accelerators and one workload: does it fit, is each hop hidden, how long does it take?

python examples/before_you_buy.py
"""

from dataclasses import replace

import ringsim
from ringsim.capacity import demands, longest_ring, tightest
from ringsim.units import format_size, format_time

MACHINES = ("dgx-h100", "dgx-h200", "mi300x", "l20-pcie")
WORKLOAD = ringsim.Workload(q_len=2**20, batch=4, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", mask=ringsim.Causal())
PER_DEVICE = WORKLOAD.q_len // 8

print(f"{WORKLOAD.batch} sequences of 1M tokens over 8 ranks, causal, zigzag; {PER_DEVICE:,} tokens of each on a device")
print("hides from: the block of one sequence at which a hop hides\n")
print(f"{'machine':<10} {'needs of a device':>21} {'longest':>8} {'hides from':>11} {'total':>9} {'hops cost':>10}")
for name in MACHINES:
    machine = ringsim.load_topology(name)
    schedule = ringsim.Schedule(workload=WORKLOAD, world_size=8, partition="zigzag")
    demand = tightest(demands(schedule, machine))
    memory = f"{format_size(demand.nbytes)} of {format_size(demand.memory_nbytes)}"
    longest = f"{longest_ring(schedule, machine) / 2**20:.1f}M"
    one = replace(schedule, workload=replace(WORKLOAD, batch=1))
    hides = ringsim.find_breakeven(one, machine)
    total_s = ringsim.simulate(schedule, machine).total_s
    exposed_s = ringsim.exposed_communication_s(schedule, machine)
    bound = "<=" if hides.tokens == hides.looked_from else ""
    print(
        f"{name:<10} {memory:>21} {longest:>8} {bound + format(hides.tokens, ','):>11} {format_time(total_s):>9} "
        f"{exposed_s / total_s:>10.1%}"
    )
