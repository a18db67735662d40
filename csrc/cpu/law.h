// SPDX-License-Identifier: Apache-2.0
// A law at one row, without a vocabulary-sized buffer: it knows its rows, its normaliser and the
// mass of each sub-tile, and computes anything else again from the logits. There are three kinds:
// * LogitsLaw, a warped sum of logits (one source of weight 1 for a member alone);
// * MixtureLaw, a weighted sum of such laws;
// * WarpedMixture, the logarithm of a mixture, warped as a whole.
// To add a kind: its class beside these, and where row_laws.cpp makes it.
#pragma once

#include <cstdint>
#include <limits>

#include "dispatch.h"
#include "parallel.h"

namespace specens {

class LogitsLaw;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Fetching a finished sub-tile costs too little to be worth less than this many at a time.
constexpr int kSubTilesPerPiece = 8;

// 0, 1 and 0 are off.
struct Filter {
  int64_t top_k = 0;
  double top_p = 1.0;
  double min_p = 0.0;

  bool active() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
  bool by_mass() const { return top_p < 1.0; }
};

// A most probable token, and whether another one ties with it; the mass is a mixture's only.
struct Argmax {
  int64_t token = 0;
  double mass = 0.0;
  bool tied = false;
};

// A summand of a mixture, or of a signed one.
struct Part {
  const LogitsLaw* law;
  double share;
};

class RowLaw {
 public:
  virtual ~RowLaw() = default;

  bool empty() const { return empty_; }
  int32_t status() const { return status_; }
  int64_t vocab_size() const { return vocab_size_; }
  int sub_tiles() const { return sub_tiles_; }
  int count(int sub_tile) const {
    const int64_t left = vocab_size_ - static_cast<int64_t>(sub_tile) * kSubTile;
    return left < kSubTile ? static_cast<int>(left) : kSubTile;
  }
  // Of each sub-tile; they sum to 1.
  const double* masses() const { return masses_; }

  virtual double probability(int64_t token) const = 0;
  virtual double log_probability(int64_t token) const = 0;
  // The largest probability.
  virtual double highest() const = 0;
  // The most probable token, the lowest id of those within `tie` nats; 0 if there is none.
  virtual Argmax argmax(double tie) const = 0;
  // Of what the law is the softmax of; 0 for a mixture, which is none.
  virtual double lse() const = 0;

  // Fillers of a buffer of kSubTile elements.
  virtual void add_masses(int sub_tile, double weight, double* out) const = 0;
  virtual void log_probabilities(int sub_tile, double* out) const = 0;

  // The laws of logits that this is a weighted sum of, up to kMaxMembers; returns how many, 0 if it
  // is no such sum.
  virtual int parts(Part* out) const = 0;

  // Computes the normaliser again in double precision.
  virtual void refine(const Team& team) = 0;

 protected:
  // Storage for the masses of sub-tiles, rounded up to kLanes.
  void attach(int64_t vocab_size, double* masses) {
    vocab_size_ = vocab_size;
    sub_tiles_ = static_cast<int>((vocab_size + kSubTile - 1) / kSubTile);
    masses_ = masses;
  }

  int64_t vocab_size_ = 0;
  int sub_tiles_ = 0;
  double* masses_ = nullptr;
  bool empty_ = true;
  int32_t status_ = 0;
};

// The softmax of values, which are logits or the logarithms of masses, after a temperature and a
// filter. Values below the cutoff have no mass.
class WarpedLaw : public RowLaw {
 public:
  // Storage for a peak of each sub-tile, too.
  void attach(int64_t vocab_size, Peak* peaks, double* masses) {
    RowLaw::attach(vocab_size, masses);
    peaks_ = peaks;
  }

  double top() const { return top_; }
  double cutoff() const { return cutoff_; }
  double temperature() const { return temperature_; }
  const Filter& filter() const { return filter_; }

  // Of the values of a sub-tile: an upper bound, and a lower bound of the largest.
  double upper_bound(int sub_tile) const { return peaks_[sub_tile].max; }
  virtual double lower_bound(int sub_tile) const = 0;
  // The values in [low, high) of a sub-tile, for a finite low; returns their number.
  virtual int collect(int sub_tile, double low, double high, double* out) const = 0;
  // The weight of the values in [edge, high) of a sub-tile for each of kEdges descending edges:
  // their number, or the sum of exp((value - top) / temperature), if that is rough good to 1e-7.
  virtual void weigh(int sub_tile, const double* edges, double high, Weighing weighing,
                     double* out) const;
  // An estimate, good to 1e-7, of all mass before the filter, in the same unit; NaN if there is
  // none.
  virtual double rough_mass() const = 0;

  double probability(int64_t token) const final;
  double log_probability(int64_t token) const final;
  double highest() const final;
  double lse() const override;
  void add_masses(int sub_tile, double weight, double* out) const override;
  void log_probabilities(int sub_tile, double* out) const final;
  void refine(const Team& team) final;

 protected:
  // -inf where there is no mass.
  virtual double value(int64_t token) const = 0;
  virtual void values(int sub_tile, double* out) const = 0;
  virtual Peak statistics(int sub_tile) const = 0;

  bool has_cutoff() const { return hard_ || filter_.active(); }
  Affine affine() const { return {top_, inverse_temperature_, log_sum_}; }
  void warp(double temperature, const Filter& filter);
  void scan(int sub_tile);
  void scan_all(const Team& team);
  void find_top();
  void find_cutoff(const Team& team);
  void normalise();
  // Makes the given log-sum-exp the normaliser.
  void take_lse();

  Peak* peaks_ = nullptr;
  double temperature_ = 1.0;
  double inverse_temperature_ = 1.0;
  Filter filter_;
  double lse_ = std::numeric_limits<double>::quiet_NaN();  // if it was given
  bool hard_ = false;  // temperature 0: the largest values share the mass
  bool cut_ = false;   // the cutoff is known
  double cutoff_ = -kInfinity;
  double top_ = 0.0;
  double log_sum_ = 0.0;
};

// The least value of a law that its filter keeps; filters.cpp.
double filter_cutoff(const WarpedLaw& law, const Team& team);

// The sum of what a signed mixture is above 0 over a sub-tile, in single precision; of one part or
// more, whose shares may have any sign.
double positive_mass(const Part* parts, int count, int sub_tile);

// The least float >= x: a float is below x iff it is below this.
float round_up(double x);

}  // namespace specens
