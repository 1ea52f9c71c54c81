"""The core: everything that lorakit does, without a word about command lines.

One word a thing:

shape          a model's modules and their sizes, without weights
plan           which device holds what of a training step, and how much of its memory
block          a fixed number of tokens, filled with whole documents where they fit
document       one row of a dataset as tokens; it never sees another document of its block
span           characters [start, end) of a text that are trained on
trained token  a token whose prediction counts in the loss
base           the pretrained model; it is never changed
adapter        the LoRA matrices that training makes, in PEFT's format
merged model   base + adapter as one ordinary model
artifact       a folder with a manifest (`lorakit.json`): whole, or not there
check          one question about this machine: ok, warn, fail or skip, with what was found and what to do
worker, rank   a process of a parallel run, and its number among all of them
engine         what computes the decoder layers: transformers and PEFT (standard), or lorakit's own code (fast)
run folder     what `train` writes: checkpoints and metrics while it runs, the adapter at its end

Imports go down only:

    planning
      training, merging, starter, probing, launching, doctor
        training.loop, merging.comparing
          evaluation, training.schedule, training.optimizers, training.checkpoints
            attention, merging.apply, merging.verifying, doctor.attention, exact_match
              attention.proving, merging.quantizing, merging.card, generation, fast.engine
                preparing, model, attention.trials, merging.plan
                  sources, packing, blocks, adapters, offloading, placement, attention.cases, attention.miniature
                    readers, tokenization, attention.implementations, memory, engines, quantized_cache,
                    doctor's other kernels
                      records, profiling, shapes, tracking, accelerate_config, parallel, fast.layers, calibration,
                      doctor's others
                        templates, weights, hub, environment, elastic, reporting, fast.linear, fast.loss, quantization,
                        doctor.trials
                          artifacts, doctor.finding, fast.kernels
                            config, disk, floats, intervals, untrusted, fast.storage
                              errors, events
"""
