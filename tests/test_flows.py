"""The flow engine against pen and paper, against a solver of its own, and what must hold whatever the flows."""

from dataclasses import dataclass
from math import inf
from random import Random

import numpy as np
import pytest
import simpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ringsim.simulation.flows import Flows


@dataclass(frozen=True)
class Job:
    """A flow to be: `changes` are (time, cap) of what befalls it later."""

    start_s: float
    nbytes: float
    path: tuple[int, ...]
    cap: float = inf
    changes: tuple[tuple[float, float], ...] = ()


class Net:
    """Flows on `capacities` whose ends are written down in the order in which they come."""

    def __init__(self, *capacities):
        self.env = simpy.Environment()
        self.flows = Flows(self.env, capacities)
        self.capacities = np.array(capacities, dtype=float)
        self.jobs, self.caps, self.of_name, self.ends = {}, {}, {}, {}

    def plan(self, name, job):
        self.jobs[name] = job
        self.at(job.start_s, lambda: self.start(name, job))
        for time_s, cap in job.changes:
            self.at(time_s, lambda cap=cap: self.set_cap(name, cap))
        return self

    def at(self, time_s, action):
        self.env.timeout(time_s - self.env.now).callbacks.append(lambda _: action())

    def start(self, name, job):
        self.caps[name] = job.cap
        self.of_name[name] = self.flows.start(job.nbytes, job.path, job.cap, lambda: self.end(name))

    def set_cap(self, name, cap):
        if self.of_name[name].active:
            self.caps[name] = cap
            self.flows.set_cap(self.of_name[name], cap)

    def end(self, name):
        assert name not in self.ends, f"{name} ended twice"
        self.ends[name] = self.env.now

    def active(self):
        return [name for name, flow in self.of_name.items() if flow.active]

    def rates(self):
        return {name: self.flows.rate(self.of_name[name]) for name in self.active()}

    def instants(self):
        """Every instant at which anything happens, once all of it has happened: rates are constant in between."""
        while self.env.peek() < inf:
            now = self.env.peek()
            while self.env.peek() == now:
                self.env.step()
            yield now

    def run(self):
        for _ in self.instants():
            pass
        return self.ends


def planned(capacities, jobs):
    net = Net(*capacities)
    for name, job in enumerate(jobs):
        net.plan(name, job)
    return net


def ends_of(capacities, **jobs):
    net = Net(*capacities)
    for name, job in jobs.items():
        net.plan(name, Job(*job))
    return net.run()


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-12)


def fair(paths, caps, capacities):
    """Max-min fair rates by bisection: the largest level at which all fit, then again for those that can still rise."""
    crosses = np.zeros((len(capacities), len(paths)))
    for flow, path in enumerate(paths):
        crosses[list(path), flow] = 1.0
    ceiling = np.array([min([cap, *capacities[list(path)]]) for path, cap in zip(paths, caps, strict=True)])
    rates, free = np.zeros(len(paths)), np.ones(len(paths), dtype=bool)

    def at(level):
        return np.where(free, np.minimum(ceiling, level), rates)

    def fits(level):
        return bool((crosses @ at(level) <= capacities * (1 + 1e-14)).all())

    while free.any():
        low, high = 0.0, ceiling[free].max()
        if fits(high):
            return at(high)
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if fits(middle) else (low, middle)
        rates = at(low)
        full = crosses @ rates >= capacities * (1 - 1e-11)
        free = free & (ceiling > low) & ~crosses[full].any(axis=0)
    return rates


def fluid(capacities, jobs):
    """When each job ends if all rates are worked out anew at every event."""
    waiting, left, ends, now = sorted(range(len(jobs)), key=lambda job: jobs[job].start_s), {}, {}, 0.0
    while waiting or left:
        rates = fair([jobs[job].path for job in left], [jobs[job].cap for job in left], np.array(capacities))
        next_start = jobs[waiting[0]].start_s - now if waiting else inf
        step = min([next_start, *(todo / rate for todo, rate in zip(left.values(), rates, strict=True))])
        now += step
        left = {job: todo - rate * step for (job, todo), rate in zip(left.items(), rates, strict=True)}
        for job in [job for job, todo in left.items() if todo <= 1e-12 * jobs[job].nbytes]:
            ends[job] = now
            del left[job]
        while waiting and jobs[waiting[0]].start_s <= now * (1 + 1e-15):
            job = waiting.pop(0)
            left[job] = jobs[job].nbytes
    return ends


def test_two_flows_on_one_resource_get_half_each():
    assert ends_of([2.0], a=(0, 4.0, (0,)), b=(0, 4.0, (0,))) == {"a": close(4.0), "b": close(4.0)}


def test_a_flow_that_ends_gives_its_share_to_the_rest():
    # thirds of 3 until c is through at 2, halves until b has its other 3 bytes at 4, then a alone
    assert ends_of([3.0], a=(0, 8.0, (0,)), b=(0, 5.0, (0,)), c=(0, 2.0, (0,))) == {"c": close(2), "b": close(4), "a": close(5)}


def test_what_a_capped_flow_leaves_goes_to_the_others():
    ends = ends_of([10.0], slow=(0, 4.0, (0,), 2.0), a=(0, 12.0, (0,)), b=(0, 12.0, (0,)))
    assert ends == {"slow": close(2.0), "a": close(2 + 4 / 5), "b": close(2 + 4 / 5)}


def test_a_flow_over_several_resources_is_bound_by_the_tightest():
    assert ends_of([7.0, 2.0, 5.0], a=(1, 6.0, (0, 1, 2))) == {"a": close(4.0)}
    assert ends_of([7.0, 2.0, 5.0], a=(1, 6.0, (0, 1, 2), 0.5)) == {"a": close(13.0)}


def test_three_flows_on_two_links_share_as_in_the_textbook():
    net = Net(1.0, 2.0)
    for name, path in {"both": (0, 1), "first": (0,), "second": (1,)}.items():
        net.start(name, Job(0, 3.0, path))
    assert net.rates() == {"both": close(0.5), "first": close(0.5), "second": close(1.5)}
    assert net.flows.load() == [close(1.0), close(2.0)]
    # second is through at 2 and first and both, on link 0 together, at 6
    assert net.run() == {"second": close(2.0), "first": close(6.0), "both": close(6.0)}
    assert net.flows.load() == [0, 0]


def test_a_flow_without_resources_runs_at_its_cap_or_ends_at_once():
    ends = ends_of([1.0], capped=(1, 6.0, (), 3.0), free=(2, 6.0, ()), beside=(0, 4.0, (0,)))
    assert ends == {"capped": close(3.0), "free": 2.0, "beside": close(4.0)}


def test_zero_bytes_end_at_once_and_disturb_nobody():
    ends = ends_of([1.0], a=(0, 2.0, (0,)), empty=(1, 0.0, (0,)), bare=(1, 0.0, ()))
    assert ends == {"empty": 1.0, "bare": 1.0, "a": close(2.0)}


def test_flows_that_start_at_different_times_share_from_then_on():
    # a has 2 of 6 bytes alone; of the remaining 4 at half the rate, b brings 3
    assert ends_of([2.0], a=(0, 6.0, (0,)), b=(1, 3.0, (0,))) == {"b": close(4.0), "a": close(4.5)}


def test_a_cap_that_changes_midway_counts_from_then_on():
    slowed = Job(0, 10.0, (0,), inf, ((1.0, 0.5), (3.0, 4.0)))
    net = planned([4.0], [slowed, Job(0, 8.0, (0,))])
    # 2 each, then 0.5 and 3.5 until the other has its 8 at 1 + 6 / 3.5, then 0.5 until 3, then all of it
    assert net.run() == {1: close(1 + 6 / 3.5), 0: close(3 + 7 / 4)}


def test_a_cap_above_the_tightest_resource_changes_nothing():
    net = planned([2.0], [Job(0, 8.0, (0,), 9.0, ((1.0, 5.0), (2.0, inf)))])
    alarms = []
    net.at(3.0, lambda: alarms.append(net.of_name[0].alike.alarm))
    assert net.run() == {0: close(4.0)}
    assert alarms == [1]


def test_a_cap_set_on_what_is_through_is_ignored():
    net = planned([2.0], [Job(0, 2.0, (0,), inf)])
    net.at(2.0, lambda: net.flows.set_cap(net.of_name[0], 1.0))
    assert net.run() == {0: close(1.0)}
    assert net.flows.rate(net.of_name[0]) == 0


def test_a_stale_end_does_not_end_who_starts_at_that_instant():
    # until its cap falls at 50 the first would end at 100, which is when one like it starts
    stale = Job(0, 100.0, (0,), 9.0, ((50.0, 0.25),))
    assert planned([1.0], [stale, Job(100, 30.0, (0,), 9.0)]).run() == {1: close(140.0), 0: close(250.0)}


def test_an_end_may_change_the_cap_of_who_ends_at_the_same_instant():
    net = Net(1.0, 1.0)
    net.start("b", Job(0, 1.0, (1,)))
    net.flows.start(1.0, (0,), inf, lambda: net.set_cap("b", 0.5))
    second = Net(1.0, 1.0)
    second.flows.start(1.0, (0,), inf, lambda: second.set_cap("b", 0.5))
    second.start("b", Job(0, 1.0, (1,)))
    for each in (net, second):
        assert each.run() == {"b": close(1.0)}
        assert each.flows.load() == [0, 0]


def test_a_start_leaves_the_other_component_alone():
    net = planned([1.0, 1.0, 1.0, 9.0], [Job(0, 5.0, (0, 3)), Job(0, 5.0, (0,)), Job(0, 7.0, (1, 3)), Job(0, 7.0, (1, 2))])
    moments = net.instants()
    next(moments)
    before = {name: (flow.alike.alarm, flow.alike.rate) for name, flow in net.of_name.items()}
    # resource 3 joins the two components, but cannot bind: its flows together bring no more than 2
    net.start("more", Job(0, 1.0, (2, 1)))
    touched, joined = net.flows._reach(dict.fromkeys(net.flows._touched))
    assert {cls.resources for cls in touched} == {(2, 1), (1, 3), (1, 2)}
    assert [resource.capacity for resource in joined] == [1.0, 1.0]
    assert net.flows.rate(net.of_name["more"]) == close(1 / 3)
    after = {name: (flow.alike.alarm, flow.alike.rate) for name, flow in net.of_name.items()}
    assert [after[name] == before[name] for name in range(4)] == [True, True, False, False]


def test_an_end_may_start_the_next_at_once():
    net = Net(2.0)
    again = Job(0, 2.0, (0,))
    net.flows.start(2.0, (0,), inf, lambda: net.start("second", again))
    net.start("beside", Job(0, 3.0, (0,)))
    # the first is through at 2; the next takes its place beside the other, which is through at 3
    assert net.run() == {"beside": close(3.0), "second": close(3.5)}


def test_a_resource_that_no_longer_binds_frees_those_beyond_it():
    # while both run, 0 and 1 are full and joined by 'a'; when 'b' goes, 'a' gets 3 and leaves 'c' 1
    net = planned([3.0, 4.0], [Job(0, 9.0, (0, 1)), Job(0, 3.0, (0,)), Job(0, 9.0, (1,))])
    rates = {now: net.rates() for now in net.instants()}
    assert rates[0] == {0: close(1.5), 1: close(1.5), 2: close(2.5)}
    assert rates[2] == {0: close(2.0), 2: close(2.0)}
    assert net.ends == {1: close(2.0), 2: close(4.0), 0: close(4 + 2 / 3)}


TIDY = st.sampled_from((0.5, 1.0, 2.0, 3.0, 6.0))
UNTIDY = st.floats(0.1, 50.0)
NUMBERS = TIDY | UNTIDY
TIMES = st.sampled_from((0.0, 1.0, 2.0, 4.0)) | st.floats(0.0, 20.0)


@st.composite
def scenes(draw, changes=True):
    """Capacities and jobs; many start at the same instant, are alike, or change their caps in mid flow."""
    capacities = draw(st.lists(NUMBERS, min_size=1, max_size=6))
    paths = st.lists(st.integers(0, len(capacities) - 1), max_size=4, unique=True).map(tuple)

    def job(start_s, nbytes, path, cap, later):
        # a time of its own for every change: two that coincide come in an order which the test would have to copy
        after = {start_s + delay_s: value for delay_s, value in later} if changes else {}
        return Job(start_s, nbytes, path, cap if path else min(cap, 7.0), tuple(sorted(after.items())))

    later = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3)
    jobs = st.builds(job, TIMES, st.just(0.0) | NUMBERS, paths, st.just(inf) | NUMBERS, later)
    chosen = draw(st.lists(jobs, min_size=1, max_size=12))
    return capacities, chosen + draw(st.lists(st.sampled_from(chosen), max_size=4))


def check_rates(net):
    """Nothing over capacity, everybody at a bottleneck, and the rates are those of the solver above."""
    rates, load = net.rates(), net.flows.load()
    assert (np.array(load) <= net.capacities * (1 + 1e-9)).all()
    on = [[name for name in rates if index in net.jobs[name].path] for index in range(len(load))]
    assert load == pytest.approx([sum(rates[name] for name in names) for names in on], rel=1e-12)
    for name, rate in rates.items():
        full = (index for index in net.jobs[name].path if load[index] >= net.capacities[index] * (1 - 1e-9))
        most = (max(rates[other] for other in on[index]) for index in full)
        assert rate >= net.caps[name] * (1 - 1e-9) or any(rate >= value * (1 - 1e-9) for value in most)
    alone = fair([net.jobs[name].path for name in rates], [net.caps[name] for name in rates], net.capacities)
    assert list(rates.values()) == pytest.approx(list(alone), rel=1e-9)


def check_all(net):
    """Checks the rates of every instant, and that each flow got the bytes that it was to get, in due time."""
    got, rates, last = dict.fromkeys(net.jobs, 0.0), {}, 0.0
    for now in net.instants():
        assert now >= last
        for name, rate in rates.items():
            got[name] += rate * (now - last)
        check_rates(net)
        rates, last = net.rates(), now
    assert got == pytest.approx({name: job.nbytes for name, job in net.jobs.items()}, rel=1e-9, abs=1e-9)
    assert list(net.ends.values()) == sorted(net.ends.values())
    assert all(net.ends[name] >= job.start_s for name, job in net.jobs.items())
    assert net.active() == []
    assert net.flows.load() == [0] * len(net.capacities)
    assert not any(resource.classes for resource in net.flows._resources)


@settings(max_examples=150, deadline=None)
@given(scene=scenes(changes=False))
def test_rates_are_max_min_fair_at_every_instant_and_all_bytes_arrive(scene):
    check_all(planned(*scene))


BACK_AND_FORTH = Job(0.0, 2.0, (0,), inf, ((0.5, 0.5), (2.0, 2.0)))


@settings(max_examples=150, deadline=None)
@given(scene=scenes())
@example(scene=([2.0], [BACK_AND_FORTH, BACK_AND_FORTH]))
def test_so_they_are_when_caps_change(scene):
    check_all(planned(*scene))


@settings(max_examples=100, deadline=None)
@given(scene=scenes())
def test_two_runs_are_equal_to_the_bit_and_looking_changes_nothing(scene):
    once, again, watched = planned(*scene), planned(*scene), planned(*scene)
    assert list(once.run().items()) == list(again.run().items())
    for _ in watched.instants():
        watched.rates()
    assert list(watched.ends.items()) == list(once.ends.items())


@settings(max_examples=100, deadline=None)
@given(scene=scenes())
def test_flows_alike_end_at_the_same_instant(scene):
    ends = planned(*scene).run()
    by_job = {}
    for name, job in enumerate(scene[1]):
        by_job.setdefault(job, set()).add(ends[name])
    assert all(len(times) == 1 for times in by_job.values())


@settings(max_examples=100, deadline=None)
@given(scene=scenes(changes=False))
def test_ends_are_those_of_a_simulation_that_recomputes_everything(scene):
    assert planned(*scene).run() == pytest.approx(fluid(*scene), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(left=scenes(), right=scenes())
def test_networks_that_share_nothing_do_not_meet(left, right):
    moved = [
        Job(job.start_s, job.nbytes, tuple(index + len(left[0]) for index in job.path), job.cap, job.changes) for job in right[1]
    ]
    both = planned(left[0] + right[0], left[1] + moved).run()
    alone = [*planned(*left).run().items(), *((name + len(left[1]), end) for name, end in planned(*right).run().items())]
    assert both == pytest.approx(dict(alone), rel=1e-12, abs=1e-12)


def crowd(seed, resources, flows, instants):
    """Many flows of many sizes that start at few instants, some of them capped."""
    random = Random(seed)
    capacities = [10 ** random.uniform(0, 2) for _ in range(resources)]
    starts = [0.0, *(random.uniform(0, 40) for _ in range(instants - 1))]
    return capacities, [
        Job(
            random.choice(starts),
            10 ** random.uniform(-2, 3),
            tuple(random.sample(range(resources), random.randint(1, 5))),
            random.choice((inf, 10 ** random.uniform(-1, 2))),
        )
        for _ in range(flows)
    ]


def test_three_hundred_flows_on_sixty_resources_end_as_if_all_were_recomputed():
    scene = crowd(3, resources=60, flows=300, instants=20)
    assert planned(*scene).run() == pytest.approx(fluid(*scene), rel=1e-9)


def test_every_instant_of_a_crowd_is_fair():
    check_all(planned(*crowd(4, resources=20, flows=80, instants=40)))
