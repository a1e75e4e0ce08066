// The generator: known answers, vectors against scalars, normals and uniforms against double evaluation.
#include <algorithm>

#include "check.h"
#include "common/philox.h"
#include "isas.h"

namespace philox = genfast::philox;

namespace {

// Box-Muller of common/philox.h in double: element i of a group of four words.
double exact_normal(const uint32_t* words, int i) {
  const int pair = i & 2;
  const double radius = std::sqrt(-2.0 * std::log((words[pair] + 1.0) * 0x1p-32));
  const double angle = words[pair + 1] * (2.0 * M_PI * 0x1p-32);
  return radius * (i & 1 ? std::sin(angle) : std::cos(angle));
}

struct KnownAnswer {
  uint32_t counter[4];
  uint64_t key;
  uint32_t words[4];
};

// Random123's kat_vectors for philox4x32-10.
constexpr KnownAnswer kKnownAnswers[] = {
    {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{~0u, ~0u, ~0u, ~0u}, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     0x299f31d0a4093822ull,
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

}  // namespace

TEST(known_answers) {
  for (const KnownAnswer& known : kKnownAnswers) {
    const uint32_t* c = known.counter;
    const philox::Words found = philox::philox(c[0], c[1], c[2], c[3], known.key);
    for (int w = 0; w < 4; ++w) CHECK(found.w[w] == known.words[w], "word %d: %08x", w, found.w[w]);
  }
  for_each_isa([](const genfast::Probe& probe, const char* isa) {
    for (const KnownAnswer& known : kKnownAnswers) {
      const uint32_t* c = known.counter;
      std::vector<uint32_t> found(static_cast<size_t>(4 * probe.width));
      probe.philox(found.data(), c[0], probe.width, c[1], false, c[2], c[3], known.key);
      for (size_t w = 0; w < 4; ++w) CHECK(found[w] == known.words[w], "%s word %zu: %08x", isa, w, found[w]);
    }
  });
}

TEST(counter_layouts) {
  const philox::Words tensor = philox::tensor_words(0x123456789ull, 7, philox::kTensorNormal, 42);
  const philox::Words same = philox::philox(0x23456789u, 1, 7, 1, 42);
  CHECK(std::equal(tensor.w, tensor.w + 4, same.w));
  const philox::Words unit = philox::rbm_words(5, 6, 7, 42);
  const philox::Words same_unit = philox::philox(5, 6, 7, 3, 42);
  CHECK(std::equal(unit.w, unit.w + 4, same_unit.w));
  CHECK(philox::uniform(0) == 0.0f && philox::uniform(255) == 0.0f && philox::uniform(256) == 0x1p-24f);
  CHECK(philox::uniform(~0u) == 1.0f - 0x1p-24f);
}

TEST(vector_philox_equals_scalar) {
  for_each_isa([](const genfast::Probe& probe, const char* isa) {
    std::mt19937_64 random(1);
    std::vector<uint64_t> groups = {0, 1, 5, 0xFFFFFFFFull, 0x100000000ull, 0x1FFFFFFFFull, ~0ull, ~0ull - 3};
    for (uint64_t back = 1; back <= 32; ++back) groups.push_back(0x100000000ull - back);  // the carry inside a vector
    for (int i = 0; i < 300; ++i) groups.push_back(random());
    for (uint64_t group : groups) {
      const uint64_t seed = random();
      const uint32_t c1 = static_cast<uint32_t>(random()), c2 = static_cast<uint32_t>(random()), c3 = c2 ^ 77;
      const int64_t count = 3 * probe.width;
      std::vector<uint32_t> found(static_cast<size_t>(4 * count));
      for (bool wide : {true, false}) {
        probe.philox(found.data(), group, count, c1, wide, c2, c3, seed);
        for (int64_t i = 0; i < count; ++i) {
          const uint64_t at = group + static_cast<uint64_t>(i);
          const uint32_t high = wide ? static_cast<uint32_t>(at >> 32) : c1;
          const philox::Words words = philox::philox(static_cast<uint32_t>(at), high, c2, c3, seed);
          CHECK(std::equal(words.w, words.w + 4, found.data() + 4 * i), "%s group %llx + %lld, wide %d", isa,
                static_cast<unsigned long long>(group), static_cast<long long>(i), wide);
        }
      }
    }
  });
}

TEST(normals_against_double) {
  for_each_isa([](const genfast::Probe& probe, const char* isa) {
    double worst = 0.0;
    for (uint64_t group : {0ull, 3ull, 0xFFFFFFFEull, 0x3FFFFFFFFFFFFFF0ull}) {
      for (int64_t count : {1, 4, 63, 64, 65, 200003}) {
        std::vector<float> found(static_cast<size_t>(count + 4 * probe.width));
        probe.normals(found.data(), group, count, 9, 0xDEADBEEFCAFEull);
        for (int64_t i = 0; i < count; ++i) {
          const uint64_t at = group + static_cast<uint64_t>(i >> 2);
          const philox::Words words = philox::tensor_words(at, 9, philox::kTensorNormal, 0xDEADBEEFCAFEull);
          const double error =
              std::fabs(found[static_cast<size_t>(i)] - exact_normal(words.w, static_cast<int>(i & 3)));
          if (!(error <= worst)) worst = error;
        }
      }
    }
    CHECK(worst <= 2e-6, "%s: worst error of a normal %.3g", isa, worst);
    std::printf("     %s: normals within %.2g\n", isa, worst);
  });
}

TEST(normals_of_edge_words) {
  std::vector<uint32_t> words;
  for (uint32_t base : {0u, 0x1FFFFFFFu, 0x20000000u, 0x3FFFFFFFu, 0x40000000u, 0x5FFFFFFFu, 0x7FFFFFFFu, 0x80000000u,
                        0x9FFFFFFFu, 0xB504F333u, 0xBFFFFFFFu, 0xC0000000u, 0xDFFFFFFFu, 0xFFFFFFFFu}) {
    for (uint32_t around = 0; around < 260; ++around) words.push_back(base + around - 130);
  }
  for (int shift = 0; shift < 32; ++shift) {
    for (uint32_t around = 0; around < 5; ++around) words.push_back((1u << shift) + around - 2);
  }
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    const size_t count = words.size();
    std::vector<float> radius(count), cosine(count), sine(count);
    probe.radius(words.data(), radius.data(), static_cast<int64_t>(count));
    probe.cos_sin(words.data(), cosine.data(), sine.data(), static_cast<int64_t>(count));
    for (size_t i = 0; i < count; ++i) {
      const double exact = std::sqrt(-2.0 * std::log1p((words[i] - 4294967295.0) * 0x1p-32));
      const double angle = words[i] * (2.0 * M_PI * 0x1p-32);
      CHECK(std::fabs(radius[i] - exact) <= 3e-7 * exact, "%s radius of %08x: %.9g, not %.9g", isa, words[i], radius[i],
            exact);
      CHECK(std::fabs(cosine[i] - std::cos(angle)) <= 1.8e-7, "%s cos of %08x: %.9g", isa, words[i], cosine[i]);
      CHECK(std::fabs(sine[i] - std::sin(angle)) <= 1.8e-7, "%s sin of %08x: %.9g", isa, words[i], sine[i]);
    }
  });
}

TEST(rbm_normals_against_double) {
  for_each_isa([](const genfast::Probe& probe, const char* isa) {
    for (uint32_t group : {0u, 1u, 0x3FFFFFC0u}) {
      for (int64_t count : {1, 4, 31, 128, 1001}) {
        std::vector<float> found(static_cast<size_t>(count + 4 * probe.width));
        probe.rbm_normals(found.data(), group, count, 0xFFFFFFFEu, 12, 0x8000000000000001ull);
        for (int64_t i = 0; i < count; ++i) {
          const uint32_t at = group + static_cast<uint32_t>(i >> 2);
          const philox::Words words = philox::philox(at, 0xFFFFFFFEu, 12, philox::kRbmNormal, 0x8000000000000001ull);
          const double exact = exact_normal(words.w, static_cast<int>(i & 3));
          CHECK(std::fabs(found[static_cast<size_t>(i)] - exact) <= 2e-6, "%s unit %lld: %.9g, not %.9g", isa,
                static_cast<long long>(i), found[static_cast<size_t>(i)], exact);
        }
      }
    }
  });
}

TEST(uniforms_equal_scalar) {
  for_each_isa([](const genfast::Probe& probe, const char* isa) {
    for (uint32_t group : {0u, 1u, 0x3FFFFFC0u}) {
      for (int64_t count : {1, 4, 31, 128, 1001}) {
        std::vector<float> found(static_cast<size_t>(count + 4 * probe.width));
        probe.uniforms(found.data(), group, count, 0xFFFFFFFFu, 12, 0x8000000000000001ull);
        for (int64_t i = 0; i < count; ++i) {
          const uint32_t at = group + static_cast<uint32_t>(i >> 2);
          const philox::Words words = philox::rbm_words(at, 0xFFFFFFFFu, 12, 0x8000000000000001ull);
          CHECK(found[static_cast<size_t>(i)] == philox::uniform(words.w[i & 3]), "%s unit %lld", isa,
                static_cast<long long>(i));
        }
      }
    }
  });
}
