// Transport along given edges by shortest augmenting paths with potentials (Jonker and Volgenant 1987), of whole masses.
//
// Edges lie row by row: of each row those that are known, which are all with cost_ij - v_j below the row's ceiling. Kept
// are potentials with u_i + v_j <= cost_ij, and = where mass flows, and u_i up to the ceiling. As v never rises, the same
// then holds of the edges that are not known, and once all mass flows, it does so at the least cost over all of them.
//
// A search starts from rows with mass left, over edges of least reduced cost, and back over those with flow, to columns
// that lack some; where it would raise a row above its ceiling it ends, and the row asks for more edges.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <queue>
#include <tuple>
#include <utility>
#include <vector>

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// Reduced costs that are so small a part of their terms are rounding.
constexpr double ROUNDING = 1e-14;

class Network {
  public:
    const long n, m;
    const int64_t* first;  // (n + 1,) where a row's edges begin
    const int* column;
    const double *cost, *ceiling;
    int64_t *supply, *demand, *flow;
    double *u, *v;
    char* asks;  // (n,) rows that ask for more edges

    // What no longer flows at its cost flows back, and what can flow at once does.
    void start() {
        const int64_t edges = first[n];
        row.resize(edges), next.assign(edges, -1), previous.assign(edges, -1), head.assign(m, -1);
        distance.assign(n + m, INF), by.resize(n + m), root.resize(n), closed.assign(n + m, 0), claims.resize(n);
        for (long i = 0; i < n; ++i)
            for (int64_t e = first[i]; e < first[i + 1]; ++e) {
                row[e] = i;
                if (flow[e] > 0 && !tight(i, e)) supply[i] += flow[e], demand[column[e]] += flow[e], flow[e] = 0;
                if (flow[e] > 0) link(e);
            }
        for (long i = 0; i < n; ++i)
            for (int64_t e = first[i]; e < first[i + 1] && supply[i] > 0; ++e)
                if (demand[column[e]] > 0 && tight(i, e)) {
                    const int64_t mass = std::min(supply[i], demand[column[e]]);
                    add(e, mass), supply[i] -= mass, demand[column[e]] -= mass;
                }
    }

    // Sends what rows have left as far as their edges are known: from all of them at once, as long as that sends some of
    // it, and much if ceilings end it; then from one after the other. Returns how many rows have mass left.
    long send() {
        std::vector<int> sources;
        for (long i = 0; i < n; ++i)
            if (supply[i] > 0) sources.push_back(i);
        const auto mass = [&] {
            int64_t sum = 0;
            for (int i : sources) sum += supply[i];
            return sum;
        };
        for (int64_t before = mass(), after; sources.size() > 1; before = after) {
            search(sources);
            const auto sent = std::remove_if(sources.begin(), sources.end(), [&](int i) { return supply[i] == 0; });
            sources.erase(sent, sources.end());
            after = mass();
            if (after == before || (ended_early && after > before - before / 8)) break;
        }
        std::vector<int> one(1);
        long left = 0;
        for (int source : sources) {
            one[0] = source;
            while (supply[source] > 0 && search(one)) {}
            left += supply[source] > 0;
        }
        return left;
    }

    Network(long n_, long m_, const int64_t* first_, const int* column_, const double* cost_, const double* ceiling_,
            int64_t* supply_, int64_t* demand_, int64_t* flow_, double* u_, double* v_, char* asks_)
        : n(n_), m(m_), first(first_), column(column_), cost(cost_), ceiling(ceiling_), supply(supply_), demand(demand_),
          flow(flow_), u(u_), v(v_), asks(asks_) {}

  private:
    using Entry = std::pair<double, int>;
    std::vector<int> row, head, next, previous;  // of edges; of columns their edges with flow, doubly linked
    std::vector<double> distance;                // of rows, then of columns
    std::vector<int> by, root;                   // edges by which they were reached; the source a row is reached from
    std::vector<char> closed;
    std::vector<int> rows, columns, touched, near, reached;
    std::vector<int64_t> claims;  // what sources have left to send when the columns that were found take some
    bool ended_early = false;     // whether a row's ceiling ended the search

    bool tight(long i, int64_t e) const {
        const double reduced = cost[e] - u[i] - v[column[e]];
        return reduced <= ROUNDING * (std::abs(u[i]) + std::abs(v[column[e]]) + std::abs(cost[e]));
    }
    void link(int e) {
        int& top = head[column[e]];
        previous[e] = -1, next[e] = top;
        if (top >= 0) previous[top] = e;
        top = e;
    }
    void unlink(int e) {
        (previous[e] >= 0 ? next[previous[e]] : head[column[e]]) = next[e];
        if (next[e] >= 0) previous[next[e]] = previous[e];
    }
    void add(int e, int64_t mass) {
        if (flow[e] == 0) link(e);
        flow[e] += mass;
        if (flow[e] == 0) unlink(e);
    }

    // Dijkstra's search until half of the sources' mass has found columns that lack it, or until a row asks for edges.
    // Potentials are then such that the paths are tight, along which mass is sent. Returns whether any was found.
    bool search(const std::vector<int>& sources) {
        ended_early = false;
        std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> open;
        int64_t wanted = 0, claimed = 0;
        double stop = INF, bound = INF;  // a row's ceiling; where one column takes enough
        int starving = -1;
        rows.clear(), columns.clear(), touched.clear(), near.clear(), reached.clear();
        const auto visit = [&](int i, double base, int source) {
            closed[i] = 1, distance[i] = base, root[i] = source, rows.push_back(i);
            if (base + (ceiling[i] - u[i]) < stop) stop = base + std::max(0.0, ceiling[i] - u[i]), starving = i;
            const double offset = base - u[i], limit = std::min(stop, bound);
            for (int64_t e = first[i]; e < first[i + 1]; ++e) {
                const int j = column[e];
                const double found = std::max(base, offset + (cost[e] - v[j]));
                if (found >= distance[n + j] || found > limit || closed[n + j]) continue;
                if (distance[n + j] == INF) touched.push_back(j);
                distance[n + j] = found, by[n + j] = e;
                if (sources.size() == 1 && demand[j] >= wanted) bound = std::min(bound, found);
                found == base ? near.push_back(j) : open.emplace(found, j);
            }
        };
        for (int i : sources) wanted += supply[i];
        for (int i : sources) claims[i] = supply[i];
        for (int i : sources) visit(i, 0, i);
        double far = 0;
        const int64_t enough = sources.size() == 1 ? wanted : wanted - wanted / 2;
        while (claimed < enough) {
            int j;
            double at = 0;
            if (!near.empty()) {
                j = near.back(), near.pop_back();
                at = distance[n + j];
            } else if (!open.empty()) {
                std::tie(at, j) = open.top();
                open.pop();
                if (at > distance[n + j]) continue;
            } else {
                at = INF;
            }
            if (at == INF || at > stop) {
                if (starving >= 0)
                    far = stop, asks[starving] = 1, ended_early = true;
                else {
                    for (int i : rows) asks[i] = 1;
                    far = reached.empty() ? 0 : distance[n + reached.back()];
                }
                break;
            }
            if (closed[n + j]) continue;
            far = std::max(far, at);
            closed[n + j] = 1, columns.push_back(j);
            const int source = root[row[by[n + j]]];
            if (demand[j] > 0) {
                const int64_t claim = std::min(demand[j], claims[source]);
                claims[source] -= claim, claimed += claim, reached.push_back(j);
            }
            for (int e = head[j]; e >= 0; e = next[e])
                if (!closed[row[e]]) by[row[e]] = e, visit(row[e], at, source);
        }
        for (int i : rows) u[i] += std::max(0.0, far - distance[i]);
        for (int j : columns) v[j] -= std::max(0.0, far - distance[n + j]);
        bool sent = false;
        for (int j : reached) sent |= push(j);
        for (int i : rows) closed[i] = 0;
        for (int j : touched) distance[n + j] = INF, closed[n + j] = 0;
        return sent;
    }

    // Sends mass along the path by which a column was reached.
    bool push(int target) {
        const int source = root[row[by[n + target]]];
        int64_t mass = std::min(supply[source], demand[target]);
        for (int i = row[by[n + target]]; i != source && mass > 0; i = row[by[n + column[by[i]]]])
            mass = std::min(mass, flow[by[i]]);
        if (mass == 0) return false;
        for (int j = target;;) {
            add(by[n + j], mass);
            const int i = row[by[n + j]];
            if (i == source) break;
            add(by[i], -mass);
            j = column[by[i]];
        }
        supply[source] -= mass, demand[target] -= mass;
        return true;
    }
};

}  // namespace

// Returns how many rows have mass left.
extern "C" long augment(long n, long m, const int64_t* first, const int* column, const double* cost,
                        const double* ceiling, int64_t* supply, int64_t* demand, int64_t* flow, double* u, double* v, char* asks) {
    Network network(n, m, first, column, cost, ceiling, supply, demand, flow, u, v, asks);
    network.start();
    return network.send();
}
