// Screens rules for running batch norm: the lesson's net, plain SGD, every option NAME=VALUE of the command line; see
// NOTES.md.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>
using namespace std;
typedef vector<float> V;
typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef float v8 __attribute__((vector_size(32), aligned(4)));
struct Hp {
  map<string, double> m;
  map<string, string> s;
  double operator()(const char* k, double d) const {
    auto i = m.find(k);
    return i == m.end() ? d : i->second;
  }
  string str(const char* k, const char* d) const {
    auto i = s.find(k);
    return i == s.end() ? string(d) : i->second;
  }
};
struct Data {
  int n;
  V x;
  vector<int> y;
};
static Data read(FILE* f) {
  Data d;
  if (fread(&d.n, 4, 1, f) != 1) exit(1);
  d.x.resize((size_t)d.n * 784);
  d.y.resize(d.n);
  if (fread(d.x.data(), 4, d.x.size(), f) != d.x.size() || fread(d.y.data(), 4, d.n, f) != (size_t)d.n) exit(1);
  return d;
}
static const float EPS = 1e-5f;

struct Norm {  // state of one norm
  int C;
  V g, b, gg, gb, mu, var, A, Bv, smu, svar, gmu;
  double t = 0;
  double tb = 0;
  V inv, um, uv;  // used in forward
  V ivs;          // group norm
  V A0, B0, pA, pB;
  double sden = 0, prate = 1, kden = 0, kla = 0, ksum = 0;
  V kprev;
  double rbar = 0, nr = 0, rmean = 0, H = 0, dshare = 0, dq = 0, dex = 0, dn = 0;
  V extra, extra2, M, S, GM, GS, gq;
  double gt = 0;
  void init(int c) {
    C = c;
    g.assign(c, 1);
    b.assign(c, 0);
    gg.assign(c, 0);
    gb.assign(c, 0);
    mu.assign(c, 0);
    var.assign(c, 1);
    A.assign(c, 0);
    Bv.assign(c, 0);
    smu.assign(c, 0);
    svar.assign(c, 1);
    gmu.assign(c, 0);
    inv.assign(c, 1);
    um.assign(c, 0);
    uv.assign(c, 1);
    extra.assign(c, 0);
    extra2.assign(c, 0);
  }
};
static thread_local double g_s = 1;
enum Mode { TRAIN, EVAL, MEASURE, SLOW };
struct Rule {
  string norm;
  double rf, rb, thr, c, gain, glr, blr, slow, capimg;
  string bound;
  double wide;
  double fm, blockmin;
  double rfp;
  double varfloor;
  double gp, gw, wh, whr, whp, s0, rho, last, fl, g2, c2, hm, gate, pf, pb, cw, kcos, kal, kfloor, kback, kceil, gcap,
      gpow, tau;
};

template <int K, int CI, int CO, int H>
struct Layer {
  static constexpr int O = (H + 1) / 2, KK = K * K * CI, P = O * O, PAD = K / 2;
  alignas(64) float W[KK][CO], dW[KK][CO];
  V col, a, y, da;
  Norm n;
  V dcol;
  void init(mt19937& r) {
    normal_distribution<float> d(0, sqrt(2 / 1.01 / KK));
    for (auto& w : W)
      for (auto& v : w) v = d(r);
    n.init(CO);
  }
  void ensure(int B) {
    if ((int)col.size() < B * P * KK) {
      col.resize((size_t)B * P * KK);
      a.resize((size_t)B * P * CO);
      y.resize((size_t)B * P * CO);
      da.resize((size_t)B * P * CO);
      dcol.resize((size_t)B * P * KK);
    }
  }
  void conv(const float* x, int B) {  // x: B,H,H,CI
    ensure(B);
    float* c = col.data();
    for (int b = 0; b < B; b++)
      for (int i = 0; i < O; i++)
        for (int j = 0; j < O; j++)
          for (int ki = 0; ki < K; ki++) {
            int yy = i * 2 + ki - PAD;
            for (int kj = 0; kj < K; kj++) {
              int xx = j * 2 + kj - PAD;
              if (yy < 0 || yy >= H || xx < 0 || xx >= H)
                memset(c, 0, CI * 4);
              else
                memcpy(c, x + ((size_t)(b * H + yy) * H + xx) * CI, CI * 4);
              c += CI;
            }
          }
    int R = B * P;
    const float* cc = col.data();
    float* o = a.data();
    int r = 0;
    for (; r + 4 <= R; r += 4) gemm<4>(cc + (size_t)r * KK, o + (size_t)r * CO);
    for (; r < R; r++) gemm<1>(cc + (size_t)r * KK, o + (size_t)r * CO);
    for (int i = 0; i < R * CO; i++) o[i] = o[i] > 0 ? o[i] : 0;
  }
  static constexpr int VW = CO < 16 ? CO : 16, NV = CO / VW;
  struct S8 {
    typedef v8 u;
    typedef float t __attribute__((vector_size(32)));
  };
  struct S16 {
    typedef v16 u;
    typedef float t __attribute__((vector_size(64)));
  };
  typedef conditional_t<(CO < 16), S8, S16> SS;
  typedef typename SS::t vf;
  static inline vf ld(const float* p) { return *(const typename SS::u*)p; }
  template <int N>
  void gemm(const float* c, float* o) {
    vf acc[N][NV];
#pragma GCC unroll 16
    for (int i = 0; i < N; i++)
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) acc[i][j] = vf{};
    for (int k = 0; k < KK; k++) {
      const float* w = W[k];
#pragma GCC unroll 16
      for (int i = 0; i < N; i++) {
        float v = c[i * KK + k];
#pragma GCC unroll 16
        for (int j = 0; j < NV; j++) acc[i][j] += v * ld(w + j * VW);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; i++)
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) *(typename SS::u*)(o + i * CO + j * VW) = acc[i][j];
  }
  // da holds dL/da (pre-relu mask applied here) ; computes dW and dx (if not null, B,H,H,CI)
  void back(int B, float* dx) {
    int R = B * P;
    float* d = da.data();
    const float* av = a.data();
    for (int i = 0; i < R * CO; i++)
      if (av[i] <= 0) d[i] = 0;
    const float* cc = col.data();
    for (int k = 0; k < KK; k += 4) {
      int m = min(4, KK - k);
      if (m == 4)
        dw<4>(cc, d, k, R);
      else
        for (int q = 0; q < m; q++) dw<1>(cc, d, k + q, R);
    }
    if (!dx) return;
    memset(dx, 0, (size_t)B * H * H * CI * 4);
    float* dc = dcol.data();
    for (int r = 0; r < R; r++) {
      const float* dr = d + (size_t)r * CO;
      float* o = dc + (size_t)r * KK;
      bool nz = false;
      for (int j = 0; j < CO; j++) nz |= dr[j] != 0;
      if (!nz) {
        memset(o, 0, KK * 4);
        continue;
      }
      int k = 0;
      for (; k + 4 <= KK; k += 4) dots<4>(dr, o, k);
      for (; k < KK; k++) dots<1>(dr, o, k);
    }
    float* c = dc;
    for (int b = 0; b < B; b++)
      for (int i = 0; i < O; i++)
        for (int j = 0; j < O; j++)
          for (int ki = 0; ki < K; ki++) {
            int yy = i * 2 + ki - PAD;
            for (int kj = 0; kj < K; kj++) {
              int xx = j * 2 + kj - PAD;
              if (!(yy < 0 || yy >= H || xx < 0 || xx >= H)) {
                float* q = dx + ((size_t)(b * H + yy) * H + xx) * CI;
                for (int ch = 0; ch < CI; ch++) q[ch] += c[ch];
              }
              c += CI;
            }
          }
  }
  template <int N>
  void dw(const float* c, const float* d, int k, int R) {
    vf acc[N][NV];
#pragma GCC unroll 16
    for (int i = 0; i < N; i++)
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) acc[i][j] = vf{};
    for (int r = 0; r < R; r++) {
      const float* dr = d + (size_t)r * CO;
#pragma GCC unroll 16
      for (int i = 0; i < N; i++) {
        float v = c[(size_t)r * KK + k + i];
#pragma GCC unroll 16
        for (int j = 0; j < NV; j++) acc[i][j] += v * ld(dr + j * VW);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; i++)
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) *(typename SS::u*)(&dW[k + i][j * VW]) = acc[i][j];
  }
  template <int N>
  void dots(const float* dr, float* o, int k) {
    vf d[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) d[j] = ld(dr + j * VW);
#pragma GCC unroll 16
    for (int q = 0; q < N; q++) {
      vf s = d[0] * ld(W[k + q]);
#pragma GCC unroll 16
      for (int j = 1; j < NV; j++) s += d[j] * ld(&W[k + q][j * VW]);
      if constexpr (VW == 16)
        o[k + q] = _mm512_reduce_add_ps((__m512)s);
      else {
        float t = 0;
        for (int j = 0; j < VW; j++) t += s[j];
        o[k + q] = t;
      }
    }
  }
};
#include "rule.h"

struct Net {
  Layer<5, 1, 8, 28> l0;
  Layer<3, 8, 16, 14> l1;
  Layer<3, 16, 32, 7> l2;
  Layer<3, 32, 64, 4> l3;
  Layer<3, 64, 64, 2> l4;
  float L[64][10], Lb[10], dL[64][10], dLb[10];
  V g0, g1, g2, g3, g4;
  V probs;
  void init(int seed) {
    mt19937 r(seed * 7919 + 13);
    l0.init(r);
    l1.init(r);
    l2.init(r);
    l3.init(r);
    l4.init(r);
    uniform_real_distribution<float> u(-1 / 8.f, 1 / 8.f);
    for (auto& w : L)
      for (auto& v : w) v = u(r);
    for (auto& v : Lb) v = u(r);
  }
  void forward(const float* x, int B, const Rule& R, Mode m, V& scores) {
    l0.conv(x, B);
    normf(l0.n, l0.a.data(), l0.y.data(), B, l0.P, R, m, 0);
    l1.conv(l0.y.data(), B);
    normf(l1.n, l1.a.data(), l1.y.data(), B, l1.P, R, m, 1);
    l2.conv(l1.y.data(), B);
    normf(l2.n, l2.a.data(), l2.y.data(), B, l2.P, R, m, 2);
    l3.conv(l2.y.data(), B);
    normf(l3.n, l3.a.data(), l3.y.data(), B, l3.P, R, m, 3);
    l4.conv(l3.y.data(), B);
    normf(l4.n, l4.a.data(), l4.y.data(), B, l4.P, R, m, 4);
    scores.resize(B * 10);
    for (int b = 0; b < B; b++) {
      for (int j = 0; j < 10; j++) scores[b * 10 + j] = Lb[j];
      for (int i = 0; i < 64; i++) {
        float v = l4.y[b * 64 + i];
        for (int j = 0; j < 10; j++) scores[b * 10 + j] += v * L[i][j];
      }
    }
  }
  float backward(const float* x, const int* yy, int B, const Rule& R, V& scores, double lr) {
    float loss = 0;
    memset(dL, 0, sizeof dL);
    memset(dLb, 0, sizeof dLb);
    g4.resize(B * 64);
    for (int b = 0; b < B; b++) {
      float* s = &scores[b * 10];
      float mx = *max_element(s, s + 10), z = 0;
      float p[10];
      for (int j = 0; j < 10; j++) z += p[j] = expf(s[j] - mx);
      for (int j = 0; j < 10; j++) p[j] /= z;
      loss -= logf(max(p[yy[b]], 1e-30f));
      for (int j = 0; j < 10; j++) p[j] = (p[j] - (j == yy[b])) / B;
      for (int j = 0; j < 10; j++) dLb[j] += p[j];
      for (int i = 0; i < 64; i++) {
        float v = l4.y[b * 64 + i], q = 0;
        for (int j = 0; j < 10; j++) {
          dL[i][j] += v * p[j];
          q += L[i][j] * p[j];
        }
        g4[b * 64 + i] = q;
      }
    }
    normb(l4.n, g4.data(), l4.a.data(), l4.da.data(), B, l4.P, R, lr, 4);
    g3.resize((size_t)B * 4 * 64);
    l4.back(B, g3.data());
    normb(l3.n, g3.data(), l3.a.data(), l3.da.data(), B, l3.P, R, lr, 3);
    g2.resize((size_t)B * 16 * 32);
    l3.back(B, g2.data());
    normb(l2.n, g2.data(), l2.a.data(), l2.da.data(), B, l2.P, R, lr, 2);
    g1.resize((size_t)B * 49 * 16);
    l2.back(B, g1.data());
    normb(l1.n, g1.data(), l1.a.data(), l1.da.data(), B, l1.P, R, lr, 1);
    g0.resize((size_t)B * 196 * 8);
    l1.back(B, g0.data());
    normb(l0.n, g0.data(), l0.a.data(), l0.da.data(), B, l0.P, R, lr, 0);
    l0.back(B, nullptr);
    return loss / B;
  }
  template <class F>
  void params(F f) {  // f(ptr,grad,n,kind)
    f(&l0.W[0][0], &l0.dW[0][0], 200, 0);
    f(&l1.W[0][0], &l1.dW[0][0], 72 * 16, 0);
    f(&l2.W[0][0], &l2.dW[0][0], 144 * 32, 0);
    f(&l3.W[0][0], &l3.dW[0][0], 288 * 64, 0);
    f(&l4.W[0][0], &l4.dW[0][0], 576 * 64, 0);
    f(&L[0][0], &dL[0][0], 640, 2);
    f(Lb, dLb, 10, 2);
    Norm* ns[5] = {&l0.n, &l1.n, &l2.n, &l3.n, &l4.n};
    for (auto n : ns) {
      f(n->g.data(), n->gg.data(), n->C, 1);
      f(n->b.data(), n->gb.data(), n->C, 1);
    }
  }
};
static double sched(const string& s, double p, double lr) {
  if (s == "constant") return lr;
  if (s == "linear") return lr + (lr / 5 - lr) * p;
  if (s == "linear0") return lr * (1 - p);
  double w = .25;
  if (p < w) return lr / 10 + (1 - cos(M_PI * p / w)) * (lr - lr / 10) / 2;
  return lr * (1 + cos(M_PI * (p - w) / (1 - w))) / 2;
}
struct Out {
  double acc[4];
  double loss;
  int fail;
  double sec;
};
static Out run(const Data& tr, const Data& va, const Hp& hp, double lr, int seed) {
  auto t0 = chrono::steady_clock::now();
  auto net = make_unique<Net>();
  net->init(seed);
  Rule R = make_rule(hp);
  int B = hp("batch", 2), N = hp("images", tr.n), ep = hp("epochs", 1);
  string sc = hp.str("schedule", "one-cycle");
  double clip = hp("clip", 0);
  double ema = hp("ema", 0);
  mt19937 r(seed * 31 + 7);
  vector<int> ord(N);
  iota(ord.begin(), ord.end(), 0);
  V x((size_t)B * 784), scores;
  vector<int> y(B);
  Out o{};
  int steps = (N / B) * ep, t = 0;
  double wconv = hp("wconv", 1), wnorm = hp("wnorm", 1), wlin = hp("wlin", 1), mom = hp("mom", 0);
  double eff = 1;
  double tail = 0;
  unique_ptr<Net> avg;
  if (ema > 0) {
    avg = make_unique<Net>();
  }
  unique_ptr<Net> vel;
  if (mom > 0) {
    vel = make_unique<Net>();
    vel->params([](float*, float*, int, int) {});
    vel->init(0);
    vel->params([](float* p, float*, int n, int) {
      for (int i = 0; i < n; i++) p[i] = 0;
    });
  }
  for (int e = 0; e < ep && !o.fail; e++) {
    shuffle(ord.begin(), ord.end(), r);
    for (int k = 0; k + B <= N; k += B, t++) {
      for (int b = 0; b < B; b++) {
        memcpy(&x[(size_t)b * 784], &tr.x[(size_t)ord[k + b] * 784], 784 * 4);
        y[b] = tr.y[ord[k + b]];
      }
      double cur = sched(sc, (double)t / steps, lr);
      net->forward(x.data(), B, R, TRAIN, scores);
      float loss = net->backward(x.data(), y.data(), B, R, scores, cur * eff);
      if (!(loss < 1e8) || isnan(loss)) {
        o.fail = t + 1;
        break;
      }
      if (hp("trace", 0) > 0) {
        static double tl = 0;
        tl += loss;
        int every = hp("trace", 0);
        if ((t + 1) % every == 0) {
          Norm* ns[5] = {&net->l0.n, &net->l1.n, &net->l2.n, &net->l3.n, &net->l4.n};
          printf("%6d loss %.3f", t + 1, tl / every);
          tl = 0;
          for (auto n : ns) {
            double q = 0, u = 0;
            for (int c = 0; c < n->C; c++) {
              q += n->g[c] * n->g[c];
              u += n->b[c] * n->b[c];
            }
            printf(" | al %.4f r %.4f sh %.3f q %.2f ex %.2f |g| %.1e g %.2f b %.2f", n->ksum / every, n->rmean / every,
                   n->dshare / every, n->dq / every, n->dex / every / B, n->dn / every / B, sqrt(q / n->C),
                   sqrt(u / n->C));
            n->ksum = n->rmean = n->dshare = n->dq = n->dex = n->dn = 0;
          }
          double q = 0;
          for (auto& w : net->L)
            for (auto v : w) q += v * v;
          printf(" L %.2f\n", sqrt(q / 640));
        }
      }
      if (t >= steps * .9) tail += loss / (steps * .1);
      if (hp("gtr", 0) > 0) {
        static double k[3] = {0}, w5[5] = {0};
        static int kk = 0;
        int wi = 0;
        net->params([&](float*, float* g, int n, int kind) {
          double q = 0;
          for (int i = 0; i < n; i++) q += (double)g[i] * g[i];
          k[kind] += q;
          if (kind == 0) w5[wi++] += q;
        });
        if (++kk % (int)hp("gtr", 0) == 0) {
          double e = hp("gtr", 0);
          printf("%d rms grad conv %.2f (%.2f %.2f %.2f %.2f %.2f) norm %.2f lin %.2f\n", kk, sqrt(k[0] / e),
                 sqrt(w5[0] / e), sqrt(w5[1] / e), sqrt(w5[2] / e), sqrt(w5[3] / e), sqrt(w5[4] / e), sqrt(k[1] / e),
                 sqrt(k[2] / e));
          k[0] = k[1] = k[2] = 0;
          for (auto& v : w5) v = 0;
        }
      }
      double s = 1;
      if (clip > 0) {
        double q = 0;
        net->params([&](float*, float* g, int n, int) {
          for (int i = 0; i < n; i++) q += (double)g[i] * g[i];
        });
        q = sqrt(q);
        s = min(1., clip / (q + 1e-6));
        double kp = hp("kept", .9);
        eff = hp("geo", 1) > 0 ? exp(kp * log(eff) + (1 - kp) * log(s)) : s;
      }
      g_s = s;
      if (mom > 0) {
        vector<float*> vs;
        vel->params([&](float* p, float*, int, int) { vs.push_back(p); });
        int i = 0;
        net->params([&](float* p, float* g, int n, int kind) {
          float f = cur * s * (kind == 0 ? wconv : kind == 1 ? wnorm : wlin) * (1 - mom);
          float* v = vs[i++];
          for (int j = 0; j < n; j++) {
            v[j] = mom * v[j] + g[j];
            p[j] -= f * v[j];
          }
        });
      } else
        net->params([&](float* p, float* g, int n, int kind) {
          float f = cur * s * (kind == 0 ? wconv : kind == 1 ? wnorm : wlin);
          for (int i = 0; i < n; i++) p[i] -= f * g[i];
        });
      if (ema > 0) {
        float f = max(ema, 1. / (t + 1));
        vector<float*> vs;
        avg->params([&](float* p, float*, int, int) { vs.push_back(p); });
        int i = 0;
        if (t == 0) {
          avg->init(0);
        }
        net->params([&](float* p, float*, int n, int) {
          float* v = vs[i++];
          if (t == 0)
            memcpy(v, p, n * 4);
          else
            for (int j = 0; j < n; j++) v[j] += f * (p[j] - v[j]);
        });
      }
    }
  }
  o.loss = tail;
  if (hp("norms", 0) > 0) {
    int i = 0;
    net->params([&](float* p, float*, int n, int kind) {
      double q = 0;
      for (int j = 0; j < n; j++) q += (double)p[j] * p[j];
      fprintf(stderr, "%d:%d rms %.3f  ", i++, kind, sqrt(q / n));
    });
    fprintf(stderr, "\n");
  }
  auto test = [&](Net& net, Mode m) {
    int ok = 0;
    V sc2;
    V xb(100 * 784);
    for (int k = 0; k < va.n; k += 100) {
      net.forward(&va.x[(size_t)k * 784], 100, R, m, sc2);
      for (int b = 0; b < 100; b++) ok += max_element(&sc2[b * 10], &sc2[b * 10] + 10) - &sc2[b * 10] == va.y[k + b];
    }
    return ok / (double)va.n;
  };
  if (!o.fail) {
    o.acc[0] = test(*net, EVAL);
    o.acc[2] = test(*net, SLOW);
    if (R.norm != "group") {
      V s2;
      net->forward(tr.x.data(), 2000, R, MEASURE, s2);
    }
    o.acc[1] = test(*net, EVAL);
    if (ema > 0) {
      V s2;
      net->forward(tr.x.data(), 2000, R, MEASURE, s2);
      avg->forward(tr.x.data(), 2000, R, MEASURE, s2);
      o.acc[3] = test(*avg, EVAL);
    }
  }
  o.sec = chrono::duration<double>(chrono::steady_clock::now() - t0).count();
  return o;
}
int main(int argc, char** argv) {
  _mm_setcsr(_mm_getcsr() | 0x8040);
  Hp hp;
  vector<double> lrs{.1};
  int seeds = 2;
  string label;
  for (int i = 1; i < argc; i++) {
    string a = argv[i];
    auto e = a.find('=');
    string k = a.substr(0, e), v = a.substr(e + 1);
    if (k == "lr") {
      lrs.clear();
      size_t p = 0;
      while (p < v.size()) {
        size_t q = v.find(',', p);
        if (q == string::npos) q = v.size();
        lrs.push_back(atof(v.substr(p, q - p).c_str()));
        p = q + 1;
      }
    } else if (k == "seeds")
      seeds = atoi(v.c_str());
    else {
      label += a + " ";
      char* end;
      double d = strtod(v.c_str(), &end);
      if (*end == 0)
        hp.m[k] = d;
      else
        hp.s[k] = v;
    }
  }
  string ds = hp.str("data", "mnist");
  FILE* f = fopen((ds + ".bin").c_str(), "rb");
  Data tr = read(f), va = read(f);
  struct J {
    double lr;
    int seed;
  };
  vector<J> js;
  int s0 = hp("seed0", 0);
  for (double l : lrs)
    for (int s = 0; s < seeds; s++) js.push_back({l, s0 + s});
  vector<Out> out(js.size());
  mutex mu;
  size_t next = 0;
  auto work = [&] {
    _mm_setcsr(_mm_getcsr() | 0x8040);
    for (;;) {
      size_t i;
      {
        lock_guard<mutex> g(mu);
        if (next >= js.size()) return;
        i = next++;
      }
      out[i] = run(tr, va, hp, js[i].lr, js[i].seed);
    }
  };
  int nt = hp("threads", 2);
  vector<thread> th;
  for (int i = 0; i < nt; i++) th.emplace_back(work);
  for (auto& t : th) t.join();
  FILE* log = fopen("screening_cpp.jsonl", "a");
  for (double l : lrs) {
    double m[4] = {0}, q = 0;
    int n = 0, fails = 0;
    string each;
    double sec = 0, loss = 0;
    for (size_t i = 0; i < js.size(); i++)
      if (js[i].lr == l) {
        auto& o = out[i];
        sec = max(sec, o.sec);
        if (o.fail) {
          fails++;
          each += " X" + to_string(o.fail);
        } else {
          n++;
          for (int k = 0; k < 4; k++) m[k] += o.acc[k];
          q += o.acc[0] * o.acc[0];
          loss += o.loss;
          char bb[32];
          sprintf(bb, " %.4f", o.acc[0]);
          each += bb;
        }
        fprintf(log,
                "{\"rule\": \"%s\", \"lr\": %g, \"seed\": %d, \"accuracies\": [%.4f, %.4f, %.4f, %.4f], \"diverged\": "
                "%d}\n",
                label.c_str(), l, js[i].seed, o.acc[0], o.acc[1], o.acc[2], o.acc[3], o.fail);
      }
    double mm = n ? m[0] / n : 0, sd = n > 1 ? sqrt(max(0., (q / n - mm * mm) * n / (n - 1))) : 0;
    printf("%s lr %g: %.4f ±%.4f meas %.4f slow %.4f ema %.4f  tail loss %.4f%s [%s ] %.1fs\n", label.c_str(), l, mm,
           sd, n ? m[1] / n : 0, n ? m[2] / n : 0, n ? m[3] / n : 0, n ? loss / n : 0, fails ? " FAILS" : "",
           each.c_str(), sec);
    fflush(stdout);
  }
}
