// The flows of a text file in SimGrid: writes the seconds that the run took, then when each flow ended, a line per flow.
//
//     flows [--cfg=...] SET ENDS
//
// SET is `LINKS FLOWS ROUNDS`, the bandwidth of each link in bytes per second, then per flow `START BYTES HOPS LINK ...`.
// With more than one round a flow starts again as soon as it is through; all its ends stand in its line.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <simgrid/s4u.hpp>
#include <simgrid/version.h>
#include <string>
#include <vector>

namespace sg4 = simgrid::s4u;

struct Flow {
  double start_s;
  uint64_t nbytes;
  std::vector<size_t> links;
  sg4::Host* from;
  sg4::Host* to;
  std::vector<double> ends_s;
};

struct Set {
  size_t rounds;
  std::vector<double> bandwidths;
  std::vector<Flow> flows;
};

static Set read(const char* path)
{
  std::ifstream in(path);
  size_t links, flows;
  Set set;
  in >> links >> flows >> set.rounds;
  set.bandwidths.resize(links);
  for (auto& bandwidth : set.bandwidths)
    in >> bandwidth;
  set.flows.resize(flows);
  for (auto& flow : set.flows) {
    size_t hops;
    in >> flow.start_s >> flow.nbytes >> hops;
    flow.links.resize(hops);
    for (auto& link : flow.links)
      in >> link;
  }
  if (not in)
    xbt_die("%s is not a set of flows", path);
  return set;
}

// A route belongs to a pair of hosts, so each flow gets a pair of its own.
static void build(Set& set)
{
  size_t number = 2;
  while (number * (number - 1) < set.flows.size())
    number++;
  auto* zone = sg4::create_full_zone("all");
  std::vector<sg4::Host*> hosts;
  for (size_t i = 0; i < number; i++)
    hosts.push_back(zone->create_host("host" + std::to_string(i), 1e9)->seal());
  std::vector<sg4::LinkInRoute> links;
  for (size_t i = 0; i < set.bandwidths.size(); i++)
    links.emplace_back(zone->create_link("link" + std::to_string(i), set.bandwidths[i])->set_latency(0.0)->seal());
  for (size_t i = 0; i < set.flows.size(); i++) {
    auto& flow = set.flows[i];
    size_t from = i / (number - 1), to = i % (number - 1);
    flow.from = hosts[from];
    flow.to = hosts[to + (to >= from)];
    std::vector<sg4::LinkInRoute> route;
    for (auto link : flow.links)
      route.push_back(links[link]);
    zone->add_route(flow.from->get_netpoint(), flow.to->get_netpoint(), nullptr, nullptr, route, false);
  }
  zone->seal();
}

// One actor starts all flows in order of time and then waits for them.
static void start_all(std::vector<Flow>& flows)
{
  std::vector<size_t> order(flows.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&flows](size_t a, size_t b) { return flows[a].start_s < flows[b].start_s; });
  std::vector<sg4::CommPtr> comms;
  for (auto index : order) {
    auto& flow = flows[index];
    if (sg4::Engine::get_clock() < flow.start_s)
      sg4::this_actor::sleep_until(flow.start_s);
    comms.push_back(sg4::Comm::sendto_async(flow.from, flow.to, flow.nbytes));
  }
  for (size_t i = 0; i < order.size(); i++) {
    comms[i]->wait();
    flows[order[i]].ends_s.push_back(comms[i]->get_finish_time());
  }
}

static void restart(Flow& flow, size_t rounds)
{
  sg4::this_actor::sleep_until(flow.start_s);
  for (size_t i = 0; i < rounds; i++) {
    sg4::Comm::sendto(flow.from, flow.to, flow.nbytes);
    flow.ends_s.push_back(sg4::Engine::get_clock());
  }
}

int main(int argc, char** argv)
{
  sg4::Engine engine(&argc, argv);
  if (argc != 3)
    xbt_die("usage: flows [--cfg=...] SET ENDS");
  Set set = read(argv[1]);
  build(set);
  if (set.rounds == 1)
    sg4::Actor::create("starter", set.flows[0].from, [&set] { start_all(set.flows); });
  else
    for (auto& flow : set.flows)
      sg4::Actor::create("sender", flow.from, [&flow, &set] { restart(flow, set.rounds); });
  auto begin = std::chrono::steady_clock::now();
  engine.run();
  std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  auto* out = fopen(argv[2], "w");
  if (out == nullptr)
    xbt_die("cannot write %s", argv[2]);
  fprintf(out, "%d.%d %.9f\n", SIMGRID_VERSION_MAJOR, SIMGRID_VERSION_MINOR, took.count());
  for (const auto& flow : set.flows) {
    for (auto end_s : flow.ends_s)
      fprintf(out, "%.17g ", end_s);
    fprintf(out, "\n");
  }
  fclose(out);
  return 0;
}
