# `terraform test`: no cloud, no credentials.
mock_provider "aws" {
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::123456789012:role/mock" }
  }
  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:us-east-1:123456789012:key/mock" }
  }
  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::mock" }
  }
  mock_resource "aws_launch_template" {
    defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
  }
}

run "gpus_start_at_zero_and_take_only_pods_that_ask_for_them" {
  command = plan

  assert {
    condition     = alltrue([for name in ["train", "prefill", "decode"] : aws_eks_node_group.this[name].scaling_config[0].min_size == 0 && aws_eks_node_group.this[name].scaling_config[0].desired_size == 0])
    error_message = "a GPU group does not start at zero"
  }
  assert {
    condition     = alltrue([for name in ["train", "prefill", "decode"] : one(aws_eks_node_group.this[name].taint).key == "nvidia.com/gpu"])
    error_message = "a GPU group takes any pod"
  }
  assert {
    condition     = length(aws_eks_node_group.this["system"].taint) == 0 && aws_eks_node_group.this["system"].scaling_config[0].min_size == 2
    error_message = "the operators have no place to run"
  }
  assert {
    condition     = alltrue([for name, group in aws_eks_node_group.this : group.labels["farspan-role"] == name])
    error_message = "a group does not carry its role, which pods ask for"
  }
}

run "the_api_server_has_no_public_address" {
  command = plan

  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_private_access && !aws_eks_cluster.this.vpc_config[0].endpoint_public_access
    error_message = "the API server is public"
  }
  assert {
    condition     = aws_eks_cluster.this.encryption_config[0].resources == toset(["secrets"])
    error_message = "secrets are not encrypted"
  }
}

run "the_bucket_is_versioned_encrypted_private_and_tls_only" {
  command = apply

  assert {
    condition     = aws_s3_bucket_versioning.this.versioning_configuration[0].status == "Enabled"
    error_message = "the bucket is not versioned"
  }
  assert {
    condition     = one(one(aws_s3_bucket_server_side_encryption_configuration.this.rule).apply_server_side_encryption_by_default).sse_algorithm == "aws:kms"
    error_message = "the bucket is not encrypted"
  }
  assert {
    condition     = aws_s3_bucket_public_access_block.this.block_public_acls && aws_s3_bucket_public_access_block.this.block_public_policy && aws_s3_bucket_public_access_block.this.ignore_public_acls && aws_s3_bucket_public_access_block.this.restrict_public_buckets
    error_message = "the bucket can be made public"
  }
  assert {
    condition     = jsondecode(aws_s3_bucket_policy.tls_only.policy).Statement[0].Condition.Bool["aws:SecureTransport"] == "false" && jsondecode(aws_s3_bucket_policy.tls_only.policy).Statement[0].Effect == "Deny"
    error_message = "the bucket answers without TLS"
  }
  assert {
    condition     = aws_ecr_repository.this.image_tag_mutability == "IMMUTABLE"
    error_message = "an image tag can be moved"
  }
}

run "nodes_keep_their_role_from_pods_and_their_disks_encrypted" {
  command = plan

  assert {
    condition     = alltrue([for template in aws_launch_template.node : template.metadata_options[0].http_tokens == "required" && template.metadata_options[0].http_put_response_hop_limit == 1])
    error_message = "a pod reaches the node's role"
  }
  assert {
    condition     = alltrue([for template in aws_launch_template.node : template.block_device_mappings[0].ebs[0].encrypted == "true"])
    error_message = "a disk is not encrypted"
  }
}

run "no_role_may_do_everything" {
  command = apply

  assert {
    condition     = alltrue([for statement in jsondecode(aws_iam_role_policy.pod.policy).Statement : !contains(flatten([statement.Action]), "*") && statement.Resource != "*"])
    error_message = "pods may reach more than their bucket"
  }
}

run "add_ons_take_the_place_of_what_a_new_cluster_has_and_keep_what_was_changed" {
  command = plan

  assert {
    condition     = alltrue([for addon in concat([aws_eks_addon.network, aws_eks_addon.volumes], values(aws_eks_addon.others)) : addon.resolve_conflicts_on_create == "OVERWRITE" && addon.resolve_conflicts_on_update == "PRESERVE"])
    error_message = "an add-on fails where a new cluster has its own, or undoes what was changed"
  }
}

run "a_gpu_group_that_never_sleeps_is_refused" {
  command = plan
  variables {
    node_groups = { train = { instance_type = "p5.48xlarge", max = 1, min = 1, gpus = 8 } }
  }
  expect_failures = [var.node_groups]
}

run "one_zone_is_refused" {
  command = plan
  variables {
    zones = ["us-east-1a"]
  }
  expect_failures = [var.zones]
}

run "an_api_server_open_to_the_world_is_refused" {
  command = plan
  variables {
    public_access_cidrs = ["0.0.0.0/0"]
  }
  expect_failures = [var.public_access_cidrs]
}
