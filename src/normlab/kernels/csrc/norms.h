// The norms on raw pointers, see module.cpp: those that are operators too.
#pragma once

#include <cstdint>

namespace normlab {

using Pointer = uintptr_t;

void batch_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                   Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer running_mean,
                   Pointer running_var, Pointer num_batches, double slope, double momentum, double eps);
void batch_backward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                    Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                    double slope, double share);
void frozen_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                    Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer mean, Pointer var,
                    double slope, double eps);
double running_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                       Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer running_mean,
                       Pointer running_var, Pointer num_batches, Pointer share, Pointer innovation,
                       Pointer gradient_share, Pointer average, Pointer latest, double slope, double momentum,
                       double eps, double least_share, double least_gradient_share, double tolerated_drift,
                       bool recomputing);
void running_backward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                      Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                      Pointer average, Pointer latest, Pointer parameters, Pointer push, Pointer measured, double slope,
                      double batch_rate, double step_bound, bool learns);
void group_forward_of(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                      Pointer weight, Pointer bias, Pointer saved, double slope, int64_t groups, double eps);
void group_backward_of(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                       Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                       double slope, int64_t groups);

}  // namespace normlab
