// The functors that host and device share, and the arithmetic of the CUDA kernels in which no
// thread meets another. `functors COMMAND [NUMBERS]` reads binary rows and writes binary rows; a
// row's type is that of the command below.
#include <array>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/statistics.h"
#include "fastres/activation.h"
#include "fastres/batch_norm.h"
#include "fastres/welford.h"

namespace {

using namespace fastres;
using namespace fastres::cuda;

using Numbers = std::vector<int64_t>;
template <int kSize>
using Doubles = std::array<double, kSize>;

template <class Row>
bool read(Row& row) {
  return std::fread(&row, sizeof(Row), 1, stdin) == 1;
}

template <class Row>
void write(const Row& row) {
  std::fwrite(&row, sizeof(Row), 1, stdout);
}

template <class Row>
void write_all(const std::vector<Row>& rows) {
  for (const Row& row : rows) {
    write(row);
  }
}

template <class In, class F>
void each(const F& f) {
  for (In in; read(in);) {
    write(f(in));
  }
}

// Calls f with the storage type of a dtype code.
template <class F>
void with_type(int64_t code, const F& f) {
  const DType dtype = DType(code);
  dtype == DType::kFloat64 ? f(Type<double>{}) : with_dtype(dtype, f);
}

template <class T>
using TypeOf = typename T::type;

// ---- dtype.h, activation.h: NUMBERS is the dtype ----

void to_acc_of(const Numbers& numbers) {
  with_type(numbers[0],
            [](auto type) { each<TypeOf<decltype(type)>>([](auto v) { return to_acc(v); }); });
}

void from_acc(const Numbers& numbers) {
  with_type(numbers[0], [](auto type) {
    using T = TypeOf<decltype(type)>;
    each<Acc<T>>([](Acc<T> v) { return FromAcc<T>::convert(v); });
  });
}

void bound(const Numbers& numbers) {
  with_type(numbers[0], [](auto type) { write(RoundsToZero<TypeOf<decltype(type)>>::bound()); });
}

void relu_of(const Numbers& numbers) {
  with_type(numbers[0], [](auto type) {
    using A = Acc<TypeOf<decltype(type)>>;
    each<A>([](A v) { return relu(v); });
  });
}

void gate(const Numbers& numbers) {
  with_type(numbers[0], [](auto type) {
    using T = TypeOf<decltype(type)>;
    each<Acc<T>>([](Acc<T> v) { return uint8_t(relu_gate<T>(v)); });
  });
}

// ---- welford.h, statistics.h ----

// NUMBERS is a postfix expression: 0 is the next row, 1 joins the last two. Evaluated until there
// are no more rows.
template <class Value, class Join>
void evaluate(const Numbers& postfix, const Join& join) {
  for (Value first; read(first);) {
    std::vector<Value> stack{first};
    for (size_t i = 1; i < postfix.size(); ++i) {
      Value value;
      if (postfix[i] == 0 && read(value)) {
        stack.push_back(value);
      } else {
        value = stack.back();
        stack.pop_back();
        stack.back() = join(stack.back(), value);
      }
    }
    write(stack.at(0));
  }
}

void merge_states(const Numbers& postfix) {
  evaluate<WelfordState>(postfix,
                         [](const WelfordState& a, const WelfordState& b) { return merge(a, b); });
}

void join_statistics(const Numbers& postfix) {
  using Value = Statistics<2>;
  evaluate<Value>(postfix, [](Value a, const Value& b) {
    a.join(b);
    return a;
  });
}

void shifted_sums(const Numbers&) {
  each<Doubles<4>>([](const auto& v) { return from_shifted_sums(v[0], v[1], v[2], v[3]); });
}

// As many packs for each group as it has, 4 at most; the result after the last group.
template <class T, int kPack>
void run_groups(const Numbers& groups) {
  Raw<T, kPack> packs[4]{};
  const auto next = [&](int64_t size) {
    return std::fread(packs, sizeof(packs[0]), size, stdin) == size_t(size);
  };
  while (next(groups[0])) {
    Running<kPack> running;
    for (size_t i = 0; i < groups.size() && (i == 0 || next(groups[i])); ++i) {
      const bool exists[] = {groups[i] > 0, groups[i] > 1, groups[i] > 2, groups[i] > 3};
      running.add(packs, exists);
    }
    write(running.statistics());
  }
}

// NUMBERS: dtype, elements of a pack (8 or 1), groups of packs (1 to 4 each).
void running(const Numbers& numbers) {
  const Numbers groups(numbers.begin() + 2, numbers.end());
  with_dtype(DType(numbers[0]), [&](auto type) {
    using T = TypeOf<decltype(type)>;
    numbers[1] == kVector ? run_groups<T, kVector>(groups) : run_groups<T, 1>(groups);
  });
}

// ---- batch_norm.h ----

void forward(const Numbers&) {
  each<Doubles<5>>(
      [](const auto& v) { return forward_coefficients(v[0], v[1], v[2], v[3], v[4]); });
}

void backward(const Numbers&) {
  each<Doubles<6>>(
      [](const auto& v) { return backward_coefficients(v[0], v[1], v[2], v[3], v[4], v[5]); });
}

// ---- tile_iteration.h, merge.h ----

struct Case {
  int64_t n, c, hw, layout, pack, threads, width, chunk_rows;

  Activations shape() const { return {n, c, hw, Layout(layout), DType::kFloat32}; }
  Tiling tiling() const { return {int(threads), int(width), chunk_rows}; }
  TileIteration iteration() const { return tile_iteration(shape(), tiling(), int(pack)); }

  // Calls f with a default-constructed Type of the case's Place.
  template <class F>
  void with_place(const F& f) const {
    with_bool(pack == kVector, [&](auto vectors) {
      with_bool(shape().per_column(), [&](auto per_column) {
        f(Type<Place<vectors.value ? kVector : 1, per_column.value>>{});
      });
    });
  }
};

void become(int64_t thread, const LaunchShape& shape, int64_t block = 0) {
  threadIdx = {unsigned(thread), 0, 0};
  blockIdx = {unsigned(block), 0, 0};
  blockDim = {unsigned(shape.threads)};
}

struct ThreadRow {
  int64_t block, chunk, lane, has_channels, channel, steps, calls;
};

struct ItemRow {
  int64_t thread;
  int64_t position;  // in the sequence of the thread's items, existing or not
  int64_t offset, mask, bit;
};

struct Visits {
  size_t most_items;
  std::vector<ThreadRow> threads;
  std::vector<ItemRow> items;

  template <int kUnroll, class P>
  void visit(const TileIteration& iteration, int64_t block, bool backwards) {
    const P place(iteration);
    threads.push_back({block, place.chunk(), place.lane(), place.has_channels(), place.channel(0),
                       place.steps(), 0});
    for_each_item<kUnroll>(Recorder{*this}, place, backwards);
    if (items.size() > most_items) {
      throw std::runtime_error("items must be " + std::to_string(most_items) + " at most");
    }
  }

  struct Recorder {
    Visits& visits;

    template <int kUnroll, class P>
    void apply(const Item (&items)[kUnroll], const P& place) const {
      const int64_t call = visits.threads.back().calls++;
      for (int64_t u = 0; u < kUnroll; ++u) {
        if (items[u].exists) {
          visits.items.push_back({int64_t(visits.threads.size()) - 1, call * kUnroll + u,
                                  items[u].offset, items[u].mask, place.mask_bit()});
        }
      }
    }
  };
};

// NUMBERS: packs in flight (4 or 1), whether backwards. All that the threads of a launch visit: for
// each case the two sizes, the threads, the items.
void visits(const Numbers& numbers) {
  for (Case at; read(at);) {
    const TileIteration iteration = at.iteration();
    const LaunchShape shape = launch_shape(iteration, at.tiling());
    Visits all{size_t(at.shape().numel()), {}, {}};
    at.with_place([&](auto place) {
      using P = TypeOf<decltype(place)>;
      for (int64_t i = 0; i < shape.blocks * shape.threads; ++i) {
        become(i % shape.threads, shape, i / shape.threads);
        numbers[0] == 4 ? all.visit<4, P>(iteration, blockIdx.x, numbers[1])
                        : all.visit<1, P>(iteration, blockIdx.x, numbers[1]);
      }
    });
    write(std::array<size_t, 2>{all.threads.size(), all.items.size()});
    write_all(all.threads);
    write_all(all.items);
  }
}

struct Probe {
  Case at;
  int64_t chunk, tile, thread, step;
};

struct ProbeRow {
  int64_t offset, mask, exists, channel, rounds, steps, tiles, chunks, rows, cols, count, numel;
};

// One item each, of shapes that no memory holds.
void probe(const Numbers&) {
  each<Probe>([](const Probe& p) {
    const TileIteration iteration = p.at.iteration();
    const Activations shape = p.at.shape();
    become(p.thread, launch_shape(iteration, p.at.tiling()));
    ProbeRow row{};
    p.at.with_place([&](auto type) {
      const TypeOf<decltype(type)> place(iteration, p.chunk, p.tile);
      const int64_t rounds = place.begin().left, round = p.step / place.widths();
      Position at = place.position(round, p.step % place.widths(), rounds - round);
      place.look_ahead(at, 1);
      const Item item = place.item(at);
      row = {item.offset,  item.mask,     item.exists,     place.channel(0),
             rounds,       place.steps(), iteration.tiles, iteration.chunks,
             shape.rows(), shape.cols(),  shape.count(),   shape.numel()};
    });
    return row;
  });
}

// Rows: group, parts, thread.
void share(const Numbers&) {
  each<std::array<int64_t, 3>>([](const auto& v) {
    become(v[2], merge_shape(1, 0));
    return MergeShare(v[0], v[1]);
  });
}

const std::map<std::string, void (*)(const Numbers&)> kCommands{
    {"to_acc", to_acc_of},
    {"from_acc", from_acc},
    {"bound", bound},
    {"relu", relu_of},
    {"gate", gate},
    {"merge", merge_states},
    {"join", join_statistics},
    {"shifted_sums", shifted_sums},
    {"running", running},
    {"forward", forward},
    {"backward", backward},
    {"visits", visits},
    {"probe", probe},
    {"share", share},
};

}  // namespace

int main(int argc, char** argv) {
  try {
    Numbers numbers;
    for (int i = 2; i < argc; ++i) {
      numbers.push_back(std::stoll(argv[i]));
    }
    kCommands.at(argv[1])(numbers);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
