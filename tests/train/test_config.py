

def test_the_recipe_for_choices(tmp_path):
    config = SVFConfig.choices(str(tmp_path), max_steps=7)
    found = (config.max_steps, config.per_device_train_batch_size, config.learning_rate, config.kl_coef)
    assert found == (7, 32, 0.01, 0.0)
